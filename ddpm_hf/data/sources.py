"""Finds images in folders, parquet files and data sets on the Hub, without decoding them."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
from huggingface_hub import DatasetCard
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from ddpm_hf.data import medical
from ddpm_hf.data.config import DataConfig
from ddpm_hf.data.frames import Frames, has_several_a_file
from ddpm_hf.data.reading import is_image_file
from ddpm_hf.data.split import NO_GROUPS, Groups

# Files that mark a folder as output of this package. Such folders below a data folder are ignored.
MARKS = {"train_config.json": "a run", "model_index.json": "a model", "sampling.json": "samples"}
log = logging.getLogger(__name__)


class Item(NamedTuple):
    """An image that is not yet decoded; `str(item)` names it in messages.

    Args:
        name: that of its file or row.
        source: the path or the content of the file.
        label: its class.
        group: images of a group are all trained on, or all held out.
        frame: which frame, page or slice of the file it is; None if the file is one image.
    """

    name: str
    source: str | Path | bytes | np.ndarray | None
    label: int | None = None
    position: tuple[int, int] | None = None  # in a stream: (epoch, rows read so far)
    group: str | None = None
    frame: int | None = None

    def __str__(self) -> str:
        return self.name if self.frame is None else f"{self.name} frame {self.frame}"


def source_of(config: DataConfig, streaming: bool = False):
    """Find the training `Item`s, the test `Item`s (sequences, or iterables if `streaming`) and the class names or None.

    Raises:
        ValueError: the data set does not exist, can't be read or has no images.
    """
    train, test, label_names = _find(config, streaming, Groups(config.group_by))
    if has_several_a_file(config):
        train, test = Frames(train, config.slices), Frames(test, config.slices)
    return train, test, label_names


def _find(config: DataConfig, streaming: bool, groups: Groups):
    """What `source_of` returns, one item a file."""
    if config.train_data_dir is not None:
        return _folder(config, streaming, groups)
    if config.dataset_name is None:
        raise ValueError("the recipe has no data set: give --train_data_dir or --dataset_name")
    import datasets

    name = config.dataset_name
    try:
        loaded = datasets.load_dataset(name, config.dataset_config_name, streaming=streaming)
    except Exception as error:  # the Hub, the network and the cache raise many types
        raise ValueError(f"dataset_name={name!r} can't be loaded: {' '.join(str(error).split())}") from error
    if "train" not in loaded:
        raise ValueError(f"dataset_name={name!r} must have a split 'train'; it has {', '.join(loaded)}")
    held_out = next((split for split in ("test", "validation") if split in loaded), None)
    train, test, label_names = _rows_of(loaded, held_out, name, groups)
    train.license = train.license or license_on_card(name)
    return train, test, label_names


def license_on_card(name: str) -> str | None:
    """The licence on the card of a data set. None without one, or, with a warning, if the card can't be read."""
    card = Path(name) / "README.md" if Path(name).is_dir() else name
    if isinstance(card, Path) and not card.is_file():
        return None
    try:
        licenses = DatasetCard.load(card).data.license or None
    except RemoteEntryNotFoundError:  # there is no card
        return None
    except Exception as error:  # the Hub, the network and invalid cards raise many types
        log.warning(f"dataset_name={name!r}: its licence is unknown because its card can't be read: {reason(error)}")
        return None
    return licenses if isinstance(licenses, str | None) else ", ".join(map(str, licenses))


def reason(error: BaseException) -> str:
    """An error in one line. A missing cache entry has the failure to reach the Hub as its cause, which says more."""
    if isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error
    return " ".join(f"{type(error).__name__}: {error}".split())


def _folder(config: DataConfig, streaming: bool, groups: Groups):
    path, folder = config.train_data_dir, Path(config.train_data_dir)
    if not folder.is_dir():
        raise ValueError(f"train_data_dir={path!r} is not a folder; it must be a folder of images or of train*.parquet")
    mark = _mark(folder)
    if mark in ("train_config.json", "model_index.json"):  # a folder of samples is allowed
        raise ValueError(
            f"train_data_dir={path!r} is the folder of {MARKS[mark]} (it has {mark}): give a folder of images"
        )
    _check_output(config, [folder])
    parquet = {split: sorted(map(str, folder.glob(f"{split}*.parquet"))) for split in ("train", "test")}
    if parquet["train"]:
        import datasets

        try:
            # load_dataset would contact the Hub even for local files
            read = datasets.Dataset.from_parquet
            loaded = {split: read(files, streaming=streaming) for split, files in parquet.items() if files}
        except Exception as error:  # datasets and pyarrow raise many types
            raise ValueError(f"train_data_dir={path!r}: its parquet files can't be read: {error}") from error
        return _rows_of(loaded, "test" if "test" in loaded else None, path, groups)
    if streaming:
        raise ValueError(f"streaming=True needs train*.parquet, and train_data_dir={path!r} has none: leave it out")
    splits = _splits(folder)
    found = [sorted(f for here, files in _walk(s) for f in files if is_image_file(f)) for s in splits]
    if not found[0]:
        raise ValueError(
            f"train_data_dir={path!r} contains no images and no train*.parquet; hidden files and the folders of runs, "
            "models and samples are ignored"
        )
    folders = {file.parent for files in found for file in files}
    _check_output(config, {up for f in folders for up in (f, *f.parents) if any(up.is_relative_to(s) for s in splits)})
    names = _classes(found[0], splits[0])
    labels = {name: k for k, name in enumerate(names or [])}

    def item(file: Path, split: Path) -> Item:
        path = file.relative_to(split)
        group = groups.of_path(str(file), path) or medical.patient_of(file)
        return Item(str(file), file, labels.get(path.parts[0]), group=group)

    items = [[item(file, split) for file in files] for files, split in zip(found, splits, strict=True)]
    return items[0], items[1] if len(items) > 1 else [], names


def _mark(folder: Path) -> str | None:
    """The name of a file that marks the folder as output of this package, or None."""
    return next((name for name in MARKS if (folder / name).is_file()), None)


def _splits(folder: Path) -> list[Path]:
    """The folders `train` and, if it exists, `test`; or the whole folder."""
    splits = [s for s in (folder / "train", folder / "test") if s.is_dir() and not _mark(s)]
    return splits if folder / "train" in splits else [folder]


def _walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """The folders with training data, from `folder` down, each with its files.

    Hidden files and folders, and folders marked by `MARKS` with all below them, are left out.
    """
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and not _mark(Path(here, name))]
        yield Path(here), [Path(here, name) for name in files if not name.startswith(".")]


def among_images(folder: Path, place: Path) -> bool:
    """Whether files in `place`, which need not exist yet, would be among the images of the data folder."""
    there = next(p for p in (place.absolute(), *place.absolute().parents) if p.is_dir()).resolve()
    return any(there == here.resolve() for here in (folder, *(here for s in _splits(folder) for here, _ in _walk(s))))


def _check_output(config: DataConfig, folders) -> None:
    """Raise ValueError if output_dir is one of `folders`: a run marks its folder, whose images are then ignored."""
    output = Path(config.output_dir).resolve()
    if any(output == folder.resolve() for folder in folders):
        raise ValueError(
            f"output_dir={config.output_dir!r} contains images of train_data_dir={config.train_data_dir!r}, which will "
            "be ignored later: give a separate folder for the run"
        )


def _classes(files: list[Path], folder: Path) -> list[str] | None:
    """The class names: the subfolders of `folder`, if there are several and all files are in them."""
    parts = [file.relative_to(folder).parts for file in files]
    names = sorted({first for first, *_ in parts})
    return names if len(names) > 1 and all(len(p) > 1 for p in parts) else None


def _rows_of(loaded, held_out: str | None, name: str, groups: Groups):
    train = Rows(loaded["train"], name, groups=groups)
    test = Rows(loaded[held_out], f"{name} {held_out}", train.label_names, groups) if held_out else []
    return train, test, train.label_names


class Rows:
    """The rows of a data set as `Item`s. Image and label are the first columns of type Image and ClassLabel.

    Args:
        names: the names of the classes in the order of the labels to return; None: those of the data set.
        groups: reads the group of a row, from a column or from the path of the image.
    """

    def __init__(self, dataset, source: str, names: list[str] | None = None, groups: Groups = NO_GROUPS):
        import datasets

        if dataset.features is None:  # a stream knows them after its first row
            dataset = dataset._resolve_features()
        features = dataset.features
        columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if not columns:
            raise ValueError(f"{source!r} has no column of type Image; its columns are {', '.join(features)}")
        labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        self.image, self.label, self.source = columns[0], labels[0] if labels else None, source
        self.own_names = features[self.label].names if labels else None
        self.label_names = names or self.own_names
        self.license = (dataset.info.license or None) if dataset.info else None
        self.groups, self.columns = groups, list(features)
        group = [groups.by] if groups.by in features else []
        self.dataset = dataset.select_columns(list(dict.fromkeys(columns[:1] + labels[:1] + group)))
        self.dataset = self.dataset.cast_column(self.image, datasets.Image(decode=False))

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, k) -> Item:
        return self.item(k, self.dataset[k])

    def __iter__(self) -> Iterator[Item]:
        return (self.item(k, row) for k, row in enumerate(self.dataset))

    def item(self, k: int, row: dict) -> Item:
        encoded = row[self.image] or {"bytes": None, "path": None}
        path, source = encoded["path"], encoded["bytes"]
        if source is None and path and "://" in path:  # a remote file of a stream
            with fsspec.open(path, "rb") as file:
                source = file.read()
        name = f"{self.source} row {k}" + (f" ({path})" if path else "")
        source = path if source is None else source
        return Item(name, source, self._label(name, row), group=self._group(name, path, row))

    def _group(self, name: str, path: str | None, row: dict) -> str | None:
        if self.groups.by in row:
            value = row[self.groups.by]
            return None if value is None else str(value)
        return self.groups.of_path(name, path, self.columns)

    def _label(self, name: str, row: dict) -> int | None:
        label = row[self.label] if self.label else None
        if label is None or label == -1:  # -1 stands for an unknown label
            return None
        if not 0 <= label < len(self.own_names):
            raise ValueError(f"{name} has the label {label}, which must be in -1 ... {len(self.own_names) - 1}")
        called = self.own_names[label]
        return self.label_names.index(called) if called in self.label_names else None
