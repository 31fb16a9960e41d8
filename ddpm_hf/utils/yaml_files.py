"""YAML in which 1e-4 is a number."""

import re
from pathlib import Path

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that 1e-4 is a number. YAML 1.1 requires a point in numbers with an exponent."""


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
        content = yaml.load(Path(path).read_text(encoding="utf-8-sig"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}={str(path)!r} can't be read as YAML or JSON in UTF-8: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}={str(path)!r} must contain settings, one `name: value` per line")
    return content
