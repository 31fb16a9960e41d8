"""Denoising diffusion probabilistic models that plug into diffusers: `DDPMUNet`, `LinearNoiseScheduler`,
`CosineNoiseScheduler`, `DDPMCustomPipeline`."""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings

__version__ = "0.1.0"

_CLASSES = {
    "DDPMUNet": "ddpm_hf.models.unet",
    "LinearNoiseScheduler": "ddpm_hf.schedulers.noise",
    "CosineNoiseScheduler": "ddpm_hf.schedulers.noise",
    "DDPMCustomPipeline": "ddpm_hf.pipelines.pipeline",
}
_PUBLIC = _CLASSES | {
    "Film": "ddpm_hf.utils.pictures",
    "SOLVERS": "ddpm_hf.schedulers.solvers",
    "TrainConfig": "ddpm_hf.training.config",
    "train": "ddpm_hf.training",
    # The base classes by which diffusers' loader knows what our components are: it looks for them here.
    "ModelMixin": "diffusers.models.modeling_utils",
    "SchedulerMixin": "diffusers.schedulers.scheduling_utils",
}
__all__ = [*_CLASSES, "SOLVERS", "Film", "TrainConfig", "train"]

# Modules under the names that they had before -> their names.
_MOVED = {
    "ddpm_hf.cli": "ddpm_hf.commands.main",  # scripts of editable installations import it
    "ddpm_hf.config": "ddpm_hf.training.config",
    "ddpm_hf.demo": "ddpm_hf.commands.page",  # Spaces that were pushed import it
    "ddpm_hf.films": "ddpm_hf.utils.pictures",
    "ddpm_hf.pipeline": "ddpm_hf.pipelines.pipeline",
    "ddpm_hf.scheduler": "ddpm_hf.schedulers.noise",
    "ddpm_hf.solvers": "ddpm_hf.schedulers.solvers",
    "ddpm_hf.unet": "ddpm_hf.models.unet",
}


def __getattr__(name: str):
    """Import a public name when it is first used: `import ddpm_hf` alone imports neither torch nor diffusers."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_PUBLIC[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


# Saved pipelines record and find our classes under the name `ddpm_hf`, whichever file they are in. For that,
# - stock `DiffusionPipeline.from_pretrained` looks the pipeline's class up among the attributes of diffusers, and
# - it loads a component of another package only where that package is a key of LOADABLE_CLASSES and has the names
#   `ModelMixin` and `SchedulerMixin`.
# This is private API, watched by a test. Registering imports nothing, so it can't meet a module half imported: it is
# done at once where diffusers has been imported, and otherwise by an import hook when it is.


def _register_classes(diffusers) -> None:
    def our_class(name: str) -> type:
        if name not in _CLASSES:
            raise AttributeError(f"module 'diffusers' has no attribute {name!r}")
        return __getattr__(name)

    diffusers.__getattr__ = our_class  # asked for the names that diffusers itself does not have (PEP 562)


def _register_package(pipeline_loading_utils) -> None:
    methods = ["save_pretrained", "from_pretrained"]
    loadable = {"ModelMixin": methods, "SchedulerMixin": methods}
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault(__name__, loadable)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls a function with a module once it has been executed, and is gone when all have been called.

    Args:
        waiting: name of the module -> function.
    """

    def __init__(self, waiting: dict):
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
                self.waiting.pop(name, lambda _: None)(sys.modules[name])  # diffusers puts another module in its place
                if not self.waiting and self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = execute_and_call
        return spec


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules under the names that they had before."""

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in _MOVED else None

    def exec_module(self, module):
        old, new = module.__name__, _MOVED[module.__name__]
        warnings.warn(f"{old} is deprecated and will be removed; use {new}", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


def _register_with_diffusers() -> None:
    waiting = {
        "diffusers": _register_classes,
        "diffusers.pipelines.pipeline_loading_utils": _register_package,
    }
    for name in [name for name in waiting if name in sys.modules]:
        waiting.pop(name)(importlib.import_module(name))  # whole, even if another thread is importing it
    if waiting:
        sys.meta_path.insert(0, _WhenImported(waiting))


_register_with_diffusers()
sys.meta_path.append(_MovedModules())
