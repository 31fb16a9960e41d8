"""How every command reads its flags: their help, their old spellings and what to do about unknown ones."""

import argparse
import difflib
import sys
from typing import NoReturn


def add_setting(group, flag: str, default, **options) -> None:
    """Add a flag that is absent from the parsed arguments unless the user gave it; its help shows `default`."""
    group.add_argument(flag, default=argparse.SUPPRESS, **options).shown_default = default


class HelpFormatter(argparse.HelpFormatter):
    """Ends the help of each flag that has a default with `(default: 50)`."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = getattr(action, "shown_default", action.default)
        has_default = default is not None and default is not False and default != argparse.SUPPRESS
        return f"{action.help} (default: {default})" if has_default else action.help


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are ValueErrors, and which knows flags by the names that they had before.

    Args:
        old_flags: the former name of a flag -> its name. Every flag may also be spelt with dashes, as some were.
        hints: a flag of other programs -> what to do here.
    """

    def __init__(self, *, old_flags: dict[str, str] | None = None, hints: dict[str, str] | None = None, **options):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)
        self.old_flags, self.hints = old_flags or {}, hints or {}

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse_args(self, args: list[str]) -> argparse.Namespace:
        namespace, unknown = self.parse_known_args([self._renamed(arg) for arg in args])
        if not unknown:
            return namespace
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            self.error(f"unexpected argument {flag!r}")
        hint = self.hints.get(_with_underscores(flag))
        if hint is None and (close := difflib.get_close_matches(flag, self._option_string_actions, n=1)):
            hint = f"did you mean {close[0]}?"
        self.error(f"there is no flag {flag!r}" + (f"; {hint}" if hint else ""))

    def _renamed(self, arg: str) -> str:
        """A flag under its present name, with a line on stderr if it was given under another."""
        flag, equals, value = arg.partition("=")
        known = self._option_string_actions
        if not flag.startswith("--") or flag in known:
            return arg
        name = self.old_flags.get(flag, _with_underscores(flag))
        if name not in known:
            return arg
        print(f"ddpm-hf: {flag} is deprecated and will be removed; use {name}", file=sys.stderr)
        return name + equals + value


def _with_underscores(flag: str) -> str:
    return "--" + flag[2:].replace("-", "_")
