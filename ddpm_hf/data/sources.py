"""Finds images in folders, parquet files and data sets on the Hub, without decoding them."""

import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import pyarrow
import pyarrow.compute
from huggingface_hub import DatasetCard
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from ddpm_hf.data import medical
from ddpm_hf.data.archives import is_zip, stamp_of
from ddpm_hf.data.config import DataConfig
from ddpm_hf.data.folders import MARKS, UNKNOWN, Inventory, mark_of, take_inventory
from ddpm_hf.data.frames import Frames, has_several_a_file
from ddpm_hf.data.split import NO_GROUPS, Groups
from ddpm_hf.utils.arguments import shorten, show

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
        train, test = (Frames(items, config.slices, config.frames) for items in (train, test))
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
        loaded = datasets.load_dataset(
            name, config.dataset_config_name, cache_dir=config.cache_dir, streaming=streaming
        )
    except Exception as error:  # the Hub, the network and the cache raise many types
        raise ValueError(f"dataset_name={name!r} can't be loaded: {' '.join(str(error).split())}") from error
    if "train" not in loaded:
        raise ValueError(f"dataset_name={name!r} must have a split 'train'; it has {', '.join(loaded)}")
    train, test, label_names = _rows_of(loaded, _held_out_split(loaded), name, config, groups)
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
    if not (folder.is_dir() or is_zip(folder)):
        raise ValueError(
            f"train_data_dir={path!r} is not a folder; it must be a folder of images or of train*.parquet, or a .zip "
            "of images"
        )
    mark = mark_of(folder)
    if mark in ("train_config.json", "model_index.json"):  # a folder of samples is allowed
        raise ValueError(
            f"train_data_dir={path!r} is the folder of {MARKS[mark]} (it has {mark}): give a folder of images"
        )
    _check_output(config, [folder])
    inventory = take_inventory(folder)
    if streaming and inventory.kind in (None, "images"):
        raise ValueError(
            f"streaming=True needs train*.parquet, and train_data_dir={path!r} has none: leave streaming out"
        )
    if inventory.kind is None:
        raise ValueError(
            f"train_data_dir={path!r} contains no images and no train*.parquet: it holds "
            f"{inventory.left_out_in_words() or 'no files'}; hidden files and the folders of runs, models and samples "
            "are ignored"
        )
    if inventory.kind != "images":
        try:
            loaded = _read_tables(inventory, streaming, config.cache_dir)
        except Exception as error:  # datasets and pyarrow raise many types
            kind = inventory.kind.removeprefix(".")
            raise ValueError(
                f"train_data_dir={path!r}: its {kind} files can't be read: {shorten(str(error), 250)}"
            ) from error
        _report(path, "", inventory)
        return _rows_of(loaded, _held_out_split(loaded), path, config, groups)
    with_images = {file.parent for file in (*inventory.train, *inventory.held_out)}
    _check_output(config, {up for here in with_images for up in (here, *here.parents) if up.is_relative_to(folder)})
    return _images(config, inventory, groups)


def _read_tables(inventory: Inventory, streaming: bool, cache_dir: str | None):
    """A mapping from splits to data sets, as `datasets` reads them. Only its builders: load_dataset calls the Hub."""
    import datasets
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    if inventory.kind == "saved":
        loaded = datasets.load_from_disk(str(inventory.folder))
        loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
        return {split: part.to_iterable_dataset() for split, part in loaded.items()} if streaming else loaded
    name, builder = {".parquet": ("parquet", Parquet), ".tar": ("webdataset", WebDataset)}[inventory.kind]
    loaded = {}
    for split, files in (("train", inventory.train), (inventory.held_out_name, inventory.held_out)):
        if files:  # a list, not patterns, so files may have any name; a reader of its own, for its own names of classes
            versions = [(str(file.stat().st_mtime_ns), str(file.stat().st_size)) for file in files]
            listed = DataFilesDict(train=DataFilesList([str(file.absolute()) for file in files], versions))
            reader = builder(cache_dir, data_files=listed, hash=_PACKAGED_DATASETS_MODULES[name][1])
            if not streaming:
                reader.download_and_prepare()
            loaded[split] = (reader.as_streaming_dataset if streaming else reader.as_dataset)(split="train")
    return loaded


def _images(
    config: DataConfig, inventory: Inventory, groups: Groups
) -> tuple[list[Item], list[Item], list[str] | None]:
    """The images of a folder, with the classes in its metadata files, or else those of its folders."""
    from ddpm_hf.data.columns import Metadata, class_names

    path, splits = config.train_data_dir, (inventory.train, inventory.held_out)
    metadata = Metadata(inventory.metadata, config.image_column, config.label_column, path, config.group_by)
    for file in metadata.unread:
        inventory.left_out[file.suffix] += 1
    others = [file for split in splits for file in split if metadata.is_other(file)]
    if others:
        inventory.left_out["images of other columns of the metadata"] += len(others)
    splits = [[file for file in split if not metadata.is_other(file)] for split in splits]
    without = len(metadata.values) - sum(map(metadata.names, itertools.chain(*splits)))
    if without:
        inventory.left_out["rows of metadata without an image here"] += without
    headers = {file: header for split in splits for file in split if (header := medical.header_of(file))}
    splits = [_of_dicom(split, headers, inventory) for split in splits]
    names, value = inventory.classes, inventory.class_of.get
    if metadata.labels:
        values = list(map(metadata.value, splits[0]))
        in_metadata, why = class_names(values, len(values), config.label_column is not None)
        if in_metadata:
            names, value = in_metadata, metadata.value
        elif config.label_column is not None:
            raise ValueError(f"label_column={config.label_column!r} of {path!r} has {why}")
    labels = {name: k for k, name in enumerate(names or [])}

    def item(file: Path) -> Item:
        if metadata.has_groups:
            group = metadata.group(file)
        else:
            group = groups.of_path(str(file), inventory.below[file], metadata.columns)
        group = group or (headers[file].group if file in headers else None)
        return Item(str(file), file, labels.get(str(value(file))), group=group)

    splits = [list(map(item, split)) for split in splits]
    found = f"{len(splits[0])} images" + (f" in {len(names)} classes" if names else "")
    found += f", {len(splits[1])} held out ({inventory.held_out_name})" if splits[1] else ""
    for split, items in zip(("training", "held-out"), splits):
        if names and (none := sum(item.label is None for item in items)):
            found += f", {none} {split} images without one of these classes"
    _report(path, found, inventory)
    return *splits, names


def _of_dicom(files: list[Path], headers: dict[Path, medical.Header], inventory: Inventory) -> list[Path]:
    """The files with the slices of each DICOM series in order, without localizers if there are other images."""
    images = [file for file in files if file not in headers or headers[file].has_image]
    wanted = [file for file in images if file not in headers or not headers[file].is_localizer] or images
    for reason, number in (
        ("files of DICOM without an image", len(files) - len(images)),
        ("localizers of DICOM series", len(images) - len(wanted)),
    ):
        inventory.left_out.update({reason: number} if number else {})
    return medical.in_order(wanted, headers)


def _report(path: str, found: str, inventory: Inventory) -> None:
    """Log in one line what a folder holds: a warning if something is left out. The main process does so once."""
    left_out = inventory.left_out_in_words()
    words = "; ".join(filter(None, (found, left_out and f"left out: {left_out}")))
    if words:
        _log_once(f"train_data_dir={path!r}: {words}", logging.WARNING if left_out else logging.INFO)


@functools.cache
def _log_once(message: str, level: int = logging.WARNING) -> None:
    if os.environ.get("RANK", "0") == "0":
        log.log(level, message)


def among_images(folder: Path, place: Path) -> bool:
    """Whether files in `place`, which need not exist yet, would be among the images of the data folder."""
    there = next(p for p in (place.absolute(), *place.absolute().parents) if p.is_dir()).resolve()
    return any(there == here.resolve() for here in (folder, *take_inventory(folder).searched))


def _check_output(config: DataConfig, folders) -> None:
    """Raise ValueError if output_dir is one of `folders`: a run marks its folder, whose images are then ignored."""
    output = Path(config.output_dir).resolve()
    if any(output == folder.resolve() for folder in folders):
        raise ValueError(
            f"output_dir={config.output_dir!r} contains images of train_data_dir={config.train_data_dir!r}, which will "
            "be ignored later: give a separate folder for the run"
        )


def _held_out_split(loaded) -> str | None:
    return next((split for split in ("test", "validation") if split in loaded), None)


def _rows_of(loaded, held_out: str | None, name: str, config: DataConfig, groups: Groups):
    columns = {"image_column": config.image_column, "label_column": config.label_column, "groups": groups}
    train = Rows(loaded["train"], name, **columns)
    test = Rows(loaded[held_out], f"{name} {held_out}", train.label_names, **columns) if held_out else []
    lacking = [each for each in getattr(test, "own_names", None) or [] if each not in (train.label_names or [])]
    if lacking and train.label_names:
        _log_once(f"{name!r}: images of these classes are held out and none is for training: {show(lacking)}")
    return train, test, train.label_names


def version_of(source: str | Path | bytes | np.ndarray | None):
    """What changes if the content of an image does: size and date of its file, or else a hash of the content."""
    if isinstance(source, str | Path):
        return stamp_of(source)
    return None if source is None else hashlib.sha256(source).hexdigest()


class Rows:
    """The rows of a data set as `Item`s. `data/columns.py` says which columns are image and label.

    Args:
        names: the names of the classes in the order of the labels to return; None: those of the data set.
        groups: reads the group of a row, from a column or from the path of the image.
        image_column, label_column: the columns; None: those that the types tell.
    """

    def __init__(
        self,
        dataset,
        source: str,
        names: list[str] | None = None,
        groups: Groups = NO_GROUPS,
        image_column: str | None = None,
        label_column: str | None = None,
    ):
        import datasets

        from ddpm_hf.data.columns import choose_image, choose_label, class_names

        if dataset.features is None:  # a stream knows them after its first row
            dataset = dataset._resolve_features()
        features = dataset.features
        self.image, self.source = choose_image(features, image_column, source), source
        self.label, self.no_classes = choose_label(features, label_column, source)
        self.own_names = getattr(features.get(self.label), "names", None)
        self.is_typed = self.own_names is not None
        if self.label and not self.is_typed:
            if not hasattr(dataset, "unique"):
                self.no_classes = (
                    f"the classes of the column {self.label!r}, which is not of type ClassLabel, are not known before "
                    "all of a stream is read: leave --streaming out, or save the data set with "
                    f"`dataset.class_encode_column({self.label!r}).to_parquet(...)`"
                )
                self.label = None
            else:
                values, number = dataset.unique(self.label), len(dataset)
                self.own_names, why = class_names(values, number, names is not None or label_column is not None)
                self.no_classes = why and f"the column {self.label!r} has {why}"
            if label_column and not (names or self.own_names):
                raise ValueError(f"label_column={label_column!r} of {source!r}: {self.no_classes}")
        self.label_names = names or self.own_names
        self.license = (dataset.info.license or None) if dataset.info else None
        self.groups, self.columns = groups, list(features)
        used = [self.image, self.label, groups.by if groups.by in features else None]
        self.dataset = dataset.select_columns(list(dict.fromkeys(filter(None, used))))
        self.array_type = getattr(features[self.image], "shape", None) and features[self.image].dtype
        if self.array_type is None:
            self.dataset = self.dataset.cast_column(self.image, datasets.Image(decode=False))

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, k) -> Item:
        return self.item(k, self.dataset[k])

    def identity(self) -> Iterator:
        """What the images depend on: the fingerprint of `datasets`, and the dates of files that rows only name."""
        yield self.source, self.image, self.dataset._fingerprint
        for chunk in self._encoded():
            named = pyarrow.compute.is_null(chunk.field("bytes"))
            for path in chunk.field("path").filter(named).to_pylist():
                yield path, None if path is None else version_of(path)

    def marks(self) -> Iterator[tuple[int | None, str | None]]:
        """The class and the group of each row, without reading its image."""
        others = [name for name in self.dataset.column_names if name != self.image]
        paths = itertools.chain.from_iterable(chunk.field("path").to_pylist() for chunk in self._encoded())
        rows = self.dataset.select_columns(others) if others else itertools.repeat({}, len(self))
        for k, (row, path) in enumerate(itertools.zip_longest(rows, paths)):
            name = self._name(k, path)
            yield self._label(name, row), self._group(name, path, row)

    def _encoded(self) -> list[pyarrow.StructArray]:
        """The column of images in pieces, or none if they are arrays."""
        return self.dataset.with_format("arrow")[:][self.image].chunks if self.array_type is None else []

    def __iter__(self) -> Iterator[Item]:
        return (self.item(k, row) for k, row in enumerate(self.dataset))

    def item(self, k: int, row: dict) -> Item:
        content, path = row[self.image], None
        if self.array_type is not None:
            source = None if content is None else np.array(content, self.array_type)
        else:
            encoded = content or {"bytes": None, "path": None}
            path, source = encoded["path"], encoded["bytes"]
            if source is None and path and "://" in path:  # a remote file of a stream
                with fsspec.open(path, "rb") as file:
                    source = file.read()
            source = path if source is None else source
        name = self._name(k, path)
        return Item(name, source, self._label(name, row), group=self._group(name, path, row))

    def _name(self, k: int, path: str | None) -> str:
        return f"{self.source} row {k}" + (f" ({path})" if path else "")

    def _group(self, name: str, path: str | None, row: dict) -> str | None:
        if self.groups.by in row:
            value = row[self.groups.by]
            return None if value is None else str(value)
        return self.groups.of_path(name, path, self.columns)

    def _label(self, name: str, row: dict) -> int | None:
        label = row[self.label] if self.label else None
        if label in UNKNOWN or not self.label_names:
            return None
        if self.is_typed:
            if not 0 <= label < len(self.own_names):
                raise ValueError(f"{name} has the label {label}, which must be in -1 ... {len(self.own_names) - 1}")
            label = self.own_names[label]
        return self.label_names.index(str(label)) if str(label) in self.label_names else None
