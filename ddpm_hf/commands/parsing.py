"""Parsing of command lines: help with defaults, former spellings of flags, and hints for unknown flags."""

import argparse
import dataclasses
import re
import sys
import typing
from typing import NoReturn

from ddpm_hf.utils.arguments import did_you_mean, shorten, show


def add_setting(group, flag: str, default, **options) -> None:
    """Add a flag that is absent from the parsed arguments unless it is given. Its help shows `default`."""
    group.add_argument(flag, default=argparse.SUPPRESS, **options).shown_default = default


def add_field(group, field: dataclasses.Field, hint) -> None:
    """Add the flag of a field of a configuration, whose type is `hint`."""
    options = _options(hint) | {"help": field.metadata["help"].replace("%", "%%")}
    default = None if field.default is dataclasses.MISSING else field.default
    add_setting(group, f"--{field.name}", default, **options)


def _options(hint) -> dict:
    """The options of argparse for a field of this type. A dict is passed as JSON, which `TrainConfig` parses."""
    kinds = typing.get_args(hint) or (hint,)
    if hint is bool:
        return {"type": _boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    for entry in (float, int):
        if list[entry] in kinds:
            return {"type": entry, "nargs": "+"}
    if dict in kinds:
        return {"metavar": "JSON"}
    return {"type": kinds[0]}


def _boolean(text: str) -> bool:
    choices = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in choices:
        raise ValueError(text)
    return choices[text.lower()]


_boolean.__name__ = "true or false"  # for argparse's message: invalid true or false value: 'maybe'


class HelpFormatter(argparse.HelpFormatter):
    """Shows the default of each flag, and a one-line usage: the flags are listed below it under their headings."""

    def add_usage(self, usage, actions, groups, prefix=None) -> None:
        self._prog += " [options]"
        super().add_usage(usage, [action for action in actions if not action.option_strings], [], prefix)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type, "TEXT")

    def _get_help_string(self, action: argparse.Action) -> str:
        default = getattr(action, "shown_default", action.default)
        if default is None or default is False or default == argparse.SUPPRESS or "default:" in action.help:
            return action.help
        return f"{action.help} (default: {default})"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError, and that also accepts former spellings of its flags.

    Args:
        old_flags: former name of a flag -> its name. Each flag may also be spelt with dashes instead of underscores.
        hints: flag of another program -> what to use instead.
    """

    def __init__(self, *, old_flags: dict[str, str] | None = None, hints: dict[str, str] | None = None, **options):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)
        self.old_flags, self.hints = old_flags or {}, hints or {}

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        hint = did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2])) if choice else ""
        raise ValueError(shorten(message + hint))

    def parse_args(self, args: list[str]) -> argparse.Namespace:
        namespace, unknown = self.parse_known_args([self._renamed(arg) for arg in args])
        if not unknown:
            return namespace
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            self.error(f"unexpected argument {show(flag)}")
        hint = self.hints.get(_with_underscores(flag))
        similar = did_you_mean(flag, self._option_string_actions)
        self.error(f"unknown flag {show(flag)}" + (f"; {hint}" if hint else similar))

    def _renamed(self, arg: str) -> str:
        """Replace a former spelling of a flag by its name, with a warning on stderr."""
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
