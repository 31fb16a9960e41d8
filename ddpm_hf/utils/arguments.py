"""Types and ranges of arguments and limits of JSON files: tables of rules, and errors of one short sentence.

A rule is a function from a value to the plain Python value that it stands for, so NumPy and PyTorch scalars are numbers
too. It raises ValueError with what would be right; `check` puts the name and the value before that. The code in a
self-contained repository carries this module, so it imports only the standard library.
"""

import contextlib
import difflib
import errno
import functools
import inspect
import json
import math
import os
import reprlib
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from os import PathLike

Rule = Callable[[object], object]
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 1e30  # in any rule that names no limit; float32 ends at 3e38
# Of a JSON file, far above any configuration or index of weights. Its values can take 25 times its bytes of memory.
MOST_JSON_BYTES, MOST_JSON_LEVELS = 2**23, 50
OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOMEM)  # errors that say nothing about a file
PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
INFINITE, NOT_FINITE = ("Infinity", "-Infinity"), ("Infinity", "-Infinity", "NaN")

_short = reprlib.Repr()
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 12
_short.maxstring = _short.maxother = _short.maxlong = 100


def check(name: str, value, rule: Rule):
    """The value as `rule` reads it; ValueError with the name, the value and what would be right."""
    try:
        return rule(value)
    except ValueError as error:
        raise ValueError(f"{name}={show(value)} {error}") from None


def check_all(values: Mapping, rules: Mapping[str, Rule]) -> dict:
    """The values that have a rule, as the rules read them."""
    return {name: check(name, values[name], rule) for name, rule in rules.items() if name in values}


def require(name: str, value, holds: bool, words: str) -> None:
    """Raise ValueError with the name, the value and `words` unless a relation between arguments holds."""
    if not holds:
        raise ValueError(f"{name}={show(value)} {words}")


def limit(what: str, size: int, most: int, why: str) -> None:
    """Raise ValueError if a size is beyond any real use, before memory or time is spent. `what` has {} for the size."""
    if size > most:
        raise ValueError(f"{what.format(_count(size))}; the limit is {_count(most)}: {why}")


def check_names(what: str, given: Iterable, known: Iterable[str]) -> None:
    """Raise ValueError for the first name that is not known, with the most similar one that is."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{what}: there is no setting {show(name)}{did_you_mean(name, known)}")


def did_you_mean(name, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name)[:100], list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def checked(rules: Mapping[str, Rule]):
    """Decorator: a call gets the arguments that have a rule as the rules read them."""

    def decorate(function):
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args, **kwargs):
            given = signature.bind(*args, **kwargs)
            given.arguments.update(check_all(given.arguments, rules))
            return function(*given.args, **given.kwargs)

        return call

    return decorate


def explained(rules: Mapping[str, Rule]):
    """Decorator: if a call fails, check its arguments, and raise ValueError about them. Other calls take no more time.

    PyTorch raises RuntimeError for shapes, types and devices that do not fit together.
    """

    def decorate(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
                given = inspect.signature(function).bind(*args, **kwargs).arguments
                check_all(given, rules)
                if not isinstance(error, RuntimeError) or "memory" in str(error):
                    raise
                shown = ", ".join(f"{name}={show(given[name], 60)}" for name in rules if name in given)
                reason = str(error).split("\n")[0][:150]
                raise ValueError(
                    f"{function.__name__}({shown}): the arguments do not fit together: {reason}"
                ) from error

        return call

    return decorate


def show(value, most: int = 100) -> str:
    """`repr(value)` in one line of at most `most` characters; of an array or a tensor its type and shape."""
    try:
        is_array = getattr(value, "ndim", 0) and hasattr(value, "dtype")
        if is_array and math.prod(value.shape) > 8:
            text = f"<{type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}>"
        else:
            text = _short.repr(value.tolist() if is_array else value)
    except Exception:  # an integer of more than 4,300 digits, or a class whose __repr__ fails
        text = f"<{type(value).__name__}>"
    text = " ".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: 10**4]).split())
    return text if len(text) <= most else f"{text[: most - 25]} ... {text[-20:]}"


def mode_of(channels: int, has_alpha: bool | None = None) -> str | None:
    """The mode that Pillow has for images of so many channels; None for images of bands, of which it has none.

    Args:
        has_alpha: whether the last of 2 or 4 channels is opacity; None: it is.
    """
    return None if channels in (2, 4) and has_alpha is False else PIL_MODES.get(channels)


def shorten(message: str, most: int = 500) -> str:
    """A message in one line without control characters and without the middle of a long one."""
    message = message if len(message) <= 10**4 else f"{message[:5000]} ... {message[-1000:]}"
    message = "".join(c if c.isprintable() or c.isspace() else ascii(c)[1:-1] for c in message)
    message = " ".join(message.split())
    return message if len(message) <= most else f"{message[: most - 155]} ... {message[-150:]}"


@contextlib.contextmanager
def short_errors():
    """Context or decorator: the ValueErrors of the block have one short line, whatever names its files contain."""
    try:
        yield
    except ValueError as error:
        raise ValueError(shorten(str(error))) from error


# ---------------------------------------------------------------- JSON files


def read_json(path, most_bytes: int = MOST_JSON_BYTES, constants: Collection[str] = ()) -> dict:
    """Read the object in a JSON file, which may come from anybody.

    Args:
        most_bytes: a larger file is refused without being read.
        constants: see `parse_json`.

    Raises:
        ValueError: there is no such file, it can't be read or is too large, or see `parse_json`.
        OSError: the machine or the network fails, and says nothing about the file.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise ValueError("it is not a file")
        limit("it has {} bytes", found.st_size, most_bytes, "such files are far smaller")
        with open(path, "rb") as file:
            return parse_json(file.read(most_bytes), constants)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in OF_THE_MACHINE:
            raise
        reason = getattr(error, "strerror", None) or error
        raise ValueError(shorten(f"{path} can't be read: {reason}")) from error


def parse_json(content: str | bytes, constants: Collection[str] = ()) -> dict:
    """Parse a JSON object.

    Args:
        constants: those of `NOT_FINITE` that are read as numbers. JSON has none of them.

    Raises:
        ValueError: it is not JSON or not an object, is nested more than 50 levels deep, or has a name twice.
    """

    def number_of(constant: str) -> float:
        if constant not in constants:
            raise ValueError(f"it has the value {constant}, which is not valid JSON")
        return float(constant)

    def unique(pairs: list[tuple]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"it has the name {show(next(n for n in names if names.count(n) > 1))} twice")
        return found

    too_deep = "its values are nested too deeply"
    try:
        found = json.loads(content, object_pairs_hook=unique, parse_constant=number_of)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(too_deep) from error
    if not isinstance(found, dict):
        raise ValueError(f"it must hold an object, not {type(found).__name__}")
    level = [found]
    for _ in range(MOST_JSON_LEVELS):
        values = (value for each in level for value in (each.values() if isinstance(each, dict) else each))
        level = [value for value in values if isinstance(value, dict | list)]
    if level:
        raise ValueError(too_deep)
    return found


# ---------------------------------------------------------------- rules


def integer(least: int = 0, most: int = LARGEST_INT, why: str = "") -> Rule:
    """An integer, not a bool. `why` is the reason for the limit `most`."""

    def read(value):
        value = _scalar(value)
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if is_int and least <= value <= most:
            return int(value)
        if is_int and value > most and (why or most == LARGEST_INT):
            raise ValueError(f"must be at most {_count(most)}{': ' if why else ''}{why}")
        among = f"of at least {least}" if why or most == LARGEST_INT else f"in {least} ... {_count(most)}"
        raise ValueError(f"must be an integer {among}")

    return read


def number(least: float = -LARGEST_FLOAT, most: float = LARGEST_FLOAT, above=None, below=None) -> Rule:
    """A finite number in [least, most], greater than `above` and less than `below`."""
    low = f"({above:g}" if above is not None else f"[{least:g}"
    high = f"{below:g})" if below is not None else f"{most:g}]"
    words = f"must be a number in {low}, {high}"
    if below is None and most == LARGEST_FLOAT:
        lowest = f" of at least {least:g}" if least > -LARGEST_FLOAT else ""
        words = f"must be a finite number{lowest if above is None else f' greater than {above:g}'}"

    def read(value):
        value = _scalar(value)
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(words)
        if (above is not None and value <= above) or (below is not None and value >= below):
            raise ValueError(words)
        return value if abs(value) < 2**53 else float(value)  # tensors take no larger integers

    return read


def boolean(value) -> bool:
    if not isinstance(value := _scalar(value), bool):
        raise ValueError("must be true or false")
    return value


def text(value) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 4096 or "\0" in value:
        raise ValueError("must be a text that is not empty")
    return str(value)


def path(value):
    """A text or an `os.PathLike`; not empty."""
    if not isinstance(value, PathLike):
        return text(value)
    return value


def one_of(*choices: str, hint: str = "") -> Rule:
    return matching(lambda v: isinstance(v, str) and v in choices, f"must be one of {', '.join(choices)}{hint}")


def matching(test: Callable[[object], bool], words: str) -> Rule:
    """Any value for which `test` holds."""

    def read(value):
        try:
            holds = bool(test(value))
        except Exception:  # a value of a type for which the test makes no sense
            holds = False
        if not holds:
            raise ValueError(words)
        return value

    return read


def optional(rule: Rule, none: str = "None") -> Rule:
    """None, or what `rule` reads. `none` is the word for it."""

    def read(value):
        try:
            return None if value is None else rule(value)
        except ValueError as error:
            raise ValueError(f"{error}, or {none}") from None

    return read


def any_of(words: str, *rules: Rule) -> Rule:
    """What the first of `rules` reads that accepts the value."""

    def read(value):
        for rule in rules:
            with contextlib.suppress(ValueError):
                return rule(value)
        raise ValueError(words)

    return read


def list_of(rule: Rule, what: str, least: int = 1, most: int = 10**6) -> Rule:
    """A list, a tuple or an array of one dimension, whose entries `rule` reads. `what` names the entries."""

    words = f"must be a list of {f'{least} ' if least == most else ''}{what}"

    def read(value):
        value = value.tolist() if getattr(value, "ndim", 0) == 1 else value
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            raise ValueError(words)
        try:
            entries = [rule(each) for each in value]
        except ValueError as error:
            raise ValueError(f"{words}; each {error}") from None
        return tuple(entries) if isinstance(value, tuple) else entries

    return read


def _scalar(value):
    """The Python number in a NumPy or PyTorch scalar; any other value unchanged."""
    try:
        return value.item() if getattr(value, "ndim", None) == 0 else value
    except Exception:  # a tensor without data
        return value


def _count(size: int) -> str:
    if size >= 10**20:
        return f"{size:.1e}" if size < 10**300 else "more than 1e300"
    return f"{size:,}" if size >= 10**5 else f"{size}"
