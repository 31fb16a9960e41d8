"""YAML in which 1e-4 is a number."""

import re
from pathlib import Path

import yaml

MOST_BYTES = 2**18  # of a file of settings; PyYAML reads about 100 kB per second


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that 1e-4 is a number. YAML 1.1 requires a point in numbers with an exponent.

    Aliases are refused: a few lines of them can stand for billions of values.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name), which are not supported: write the values out")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path, name: str) -> dict:
    """Read the names and values in a YAML or JSON file.

    Args:
        path: a file, or a resource of a package.
        name: the setting that gave the path, for error messages.

    Raises:
        ValueError: the file can't be read, is not UTF-8, or does not contain a mapping as YAML or JSON.
    """
    try:
        path = Path(path)
        if path.stat().st_size > MOST_BYTES:
            raise yaml.YAMLError(f"it has {path.stat().st_size:,} bytes, more than the limit of {MOST_BYTES:,}")
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except RecursionError as error:
        raise ValueError(f"{name}={str(path)!r} can't be read: its values are nested too deeply") from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a number or date that is none
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name}={str(path)!r} can't be read as YAML or JSON in UTF-8: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}={str(path)!r} must contain settings, one `name: value` per line")
    return content
