"""Which columns of a data set are its images and its classes, and what the classes are called.

One column that could be meant is taken. Of several, none is: the error names the setting that chooses.
"""

import io
import os
from collections.abc import Iterable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from ddpm_hf.data.archives import read_bytes
from ddpm_hf.data.folders import UNKNOWN, natural_order
from ddpm_hf.utils.arguments import show

LABELS = ("label", "cls")  # what columns of classes without the type ClassLabel are called in imagefolder, WebDataset
FILE_NAME = "file_name"


def choose_image(features: datasets.Features, given: str | None, source: str) -> str:
    """The column of the images: `given`, or the only column of type Image, else of encoded files, else of arrays.

    Raises:
        ValueError: there is no such column, or there are several and none is given.
    """
    kinds = {name: _image_kind(feature) for name, feature in features.items()}
    if given is not None:
        if kinds.get(given) is None:
            found = ", ".join(name for name, kind in kinds.items() if kind) or "none"
            raise ValueError(f"image_column={show(given)} is not a column of images of {source!r}, which are: {found}")
        return given
    for kind in ("of type Image", "of bytes", "of arrays"):
        found = [name for name in kinds if kinds[name] == kind]
        if len(found) > 1:
            raise ValueError(
                f"{source!r} has several columns {kind}: {_list(found)}; choose the images with --image_column"
            )
        if found:
            return found[0]
    raise ValueError(f"{source!r} has no column of type Image; its columns are {_list(features)}")


def _image_kind(feature) -> str | None:
    """How a column holds images; None if it can't."""
    if isinstance(feature, datasets.Image):
        return "of type Image"
    if isinstance(feature, datasets.Array2D | datasets.Array3D):
        return "of arrays"
    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return "of bytes" if getattr(content, "dtype", None) in ("binary", "large_binary") else None


def choose_label(features: datasets.Features, given: str | None, source: str) -> tuple[str | None, str]:
    """The column of the classes, and why there is none.

    It is `given`, or the only one of type ClassLabel, else one of integers or texts that is called as in `LABELS`.

    Raises:
        ValueError: `given` is not a column with one class per image.
    """
    kinds = {name: _label_kind(feature) for name, feature in features.items()}
    several = [name for name, kind in kinds.items() if kind == "several"]
    if given is not None:
        if kinds.get(given) == "several":
            raise ValueError(f"label_column={show(given)} of {source!r} has several labels per image; one is supported")
        if kinds.get(given) is None:
            found = _list(name for name, kind in kinds.items() if kind in ("ClassLabel", "values")) or "none"
            raise ValueError(
                f"label_column={show(given)} is not a column of classes, integers or texts of {source!r}, which are: "
                f"{found}"
            )
        return given, ""
    typed = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    if len(typed) > 1:
        return None, f"{source!r} has several columns of classes: {_list(typed)}; choose one with --label_column"
    called = [name for name in LABELS if kinds.get(name) == "values"]
    if several and not typed + called:
        return None, f"the column {several[0]!r} of {source!r} has several labels per image; one is supported"
    return next(iter(typed + called), None), ""


def _label_kind(feature) -> str | None:
    if isinstance(feature, datasets.ClassLabel):
        return "ClassLabel"
    if isinstance(feature, datasets.List | datasets.LargeList):
        return "several" if _label_kind(feature.feature) else None
    kind = getattr(feature, "dtype", "")
    return "values" if kind in ("string", "large_string", "bool") or kind.startswith(("int", "uint")) else None


def class_names(values: Iterable, number: int, is_chosen: bool) -> tuple[list[str] | None, str]:
    """The names of the classes in a column of integers or texts, in natural order, or None and why.

    Args:
        values: the values, each at least once.
        number: how many values the column has. Where each has its own, such as captions, they are classes only if
            someone has chosen the column.
    """
    names = {str(value) for value in values if value not in UNKNOWN}
    if len(names) < 2:
        return None, "fewer than two values"
    if not is_chosen and 2 * len(names) > number:
        return None, f"{len(names)} values for {number} images; if they are classes, choose it with --label_column"
    return natural_order(names), ""


def _list(names: Iterable[str]) -> str:
    return show(", ".join(map(str, names)), 150).strip("'\"")


class Metadata:
    """The classes in the metadata files of a folder of images, as of `datasets`' imagefolder.

    Args:
        files: the metadata files; those that name no files are in `unread`.
        image_column: which of several columns of file names has the images: `image` for file_name, `mask` for
            mask_file_name.
        label_column: the column of the classes.
        group_by: perhaps a column of groups; if there is none of that name, `has_groups` is false.

    Raises:
        ValueError: the settings name no such column, or there are several columns of images and none is chosen.
    """

    def __init__(
        self,
        files: list[Path],
        image_column: str | None,
        label_column: str | None,
        source: str,
        group_by: str | None = None,
    ):
        self.values: dict[str, object] = {}
        self.groups: dict[str, object] = {}
        self.columns: dict[str, None] = {}  # without those of file names
        self.has_groups = False
        self.others: set[str] = set()
        self.unread: list[Path] = []
        self.labels: list[str] = []  # the columns of the classes
        for file in files:
            table = _read_table(file)
            named = {_image_column(name): name for name in table.column_names if _image_column(name)} if table else {}
            if not named:
                self.unread.append(file)
                continue
            features = datasets.Features.from_arrow_schema(table.schema)
            plain = {name: feature for name, feature in features.items() if name not in named.values()}
            image = choose_image({name: datasets.Image() for name in named}, image_column, str(file))
            label, _ = choose_label(plain, label_column, str(file))
            labels = table[label].to_pylist() if label else [None] * len(table)
            self.labels += [label] if label else []
            groups = table[group_by].to_pylist() if group_by in plain else [None] * len(table)
            self.has_groups = self.has_groups or group_by in plain
            self.columns |= dict.fromkeys(plain)
            for column, name in named.items():
                paths = [_key(file.parent / str(path)) for path in table[name].to_pylist()]
                if column == image:
                    self.values.update(zip(paths, labels))
                    self.groups.update(zip(paths, groups))
                else:
                    self.others.update(paths)
        for name, given in (("image_column", image_column), ("label_column", label_column)):
            if given is not None and len(self.unread) == len(files):
                raise ValueError(
                    f"{name}={show(given)}: {source!r} is a folder of images, whose columns would be in a metadata.csv "
                    "with a column file_name; it has none"
                )

    def names(self, file: Path) -> bool:
        """Whether a row has this file as its image."""
        return _key(file) in self.values

    def value(self, file: Path):
        """The value in the column of classes; None without one."""
        return self.values.get(_key(file))

    def group(self, file: Path) -> str | None:
        """The value in the column of groups; None without one."""
        group = self.groups.get(_key(file))
        return None if group is None else str(group)

    def is_other(self, file: Path) -> bool:
        """Whether the file is in a column of images that was not chosen."""
        return _key(file) in self.others and not self.names(file)


def _image_column(name: str) -> str | None:
    """The column of images that `datasets` makes of a column of file names; None of another column."""
    if name == FILE_NAME:
        return "image"
    return name.removesuffix(f"_{FILE_NAME}") if name.endswith(f"_{FILE_NAME}") else None


def _key(path: Path) -> str:
    return os.path.normpath(path)


def _read_table(file: Path) -> pyarrow.Table | None:
    """The table in a metadata file; None if it has none."""
    read = {
        ".csv": pyarrow.csv.read_csv,
        ".jsonl": pyarrow.json.read_json,
        ".parquet": pyarrow.parquet.read_table,
    }
    try:
        return read[file.suffix.lower()](io.BytesIO(read_bytes(file)))
    except Exception:  # pyarrow and zipfile raise many types
        return None
