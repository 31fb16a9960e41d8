"""YAML as people write it: PyYAML's, in which 1e-4 is a number too."""

import re
from pathlib import Path

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-4, without a point, for a word."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path, name: str) -> dict:
    """The names and values in a YAML or JSON file.

    Args:
        path: of the file, or a resource of a package.
        name: the setting that gave the path, for the messages of errors.

    Raises:
        ValueError: the file can't be read, is not UTF-8, is not YAML or JSON, or holds something else.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8-sig"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}={str(path)!r} is not a file of YAML or JSON in UTF-8: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}={str(path)!r} must hold settings, one `name: value` a line")
    return content
