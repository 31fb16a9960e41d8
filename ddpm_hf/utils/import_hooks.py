"""Import hooks: functions that run when a module is first imported, and modules that keep their former names."""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import ModuleType


def call_when_imported(functions: dict[str, Callable[[ModuleType], None]]) -> None:
    """Call each function with the module that its key names: now if the module is imported, otherwise after its import.

    This imports no module that is not imported yet.
    """
    waiting = dict(functions)
    for name in [name for name in waiting if name in sys.modules]:
        waiting.pop(name)(importlib.import_module(name))  # blocks while another thread is still importing it
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))


def keep_former_names(moved: dict[str, str]) -> None:
    """Make modules importable under their former names (former name -> name), with a DeprecationWarning."""
    sys.meta_path.append(_FormerNames(moved))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Wraps the loaders of the modules in `waiting`, and removes itself once all of them are imported."""

    def __init__(self, waiting: dict[str, Callable[[ModuleType], None]]):
        self.waiting = waiting

    def find_spec(self, name, path=None, target=None):
        if name not in self.waiting:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module):
                execute(module)
                # Read from sys.modules, because diffusers replaces its own module there by a lazy one.
                self.waiting.pop(name, lambda _: None)(sys.modules[name])
                if not self.waiting and self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = execute_and_call
        return spec


class _FormerNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, moved: dict[str, str]):
        self.moved = moved

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.moved else None

    def exec_module(self, module):
        former, name = module.__name__, self.moved[module.__name__]
        warnings.warn(f"{former} is deprecated and will be removed; use {name}", DeprecationWarning, stacklevel=2)
        sys.modules[former] = importlib.import_module(name)
