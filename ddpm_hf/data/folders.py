"""The inventory of a folder: which files are training data, of which split and class, and which are left out and why.

Nothing is decoded here. What lies in a folder is taken by the first of these rules that fits:

1. a folder of `datasets.Dataset.save_to_disk`;
2. tables: parquet files that are named as a training split, or any parquet or tar (WebDataset) file without images;
3. images;
4. `.zip` files, as if their content were in the folder in their place.

Splits are named by folders, or by the beginning or a word of the file name of a table or a .zip, in any case: `SPLITS`.
"""

import functools
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_hf.data.archives import ZIP, is_zip, list_files
from ddpm_hf.data.reading import is_image_file

# Files that mark a folder as output of this package. Such folders below a data folder are ignored.
MARKS = {"train_config.json": "a run", "model_index.json": "a model", "sampling.json": "samples"}
SPLITS = {  # the words of `datasets`
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
WORDS = {word: split for split, words in SPLITS.items() for word in words}
TABLES = (".parquet", ".tar")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of an imagefolder of `datasets`
JUNK = ("thumbs.db", "desktop.ini", "__macosx")  # of Windows and macOS; hidden files are ignored too
HEADERS_ONLY = (".bufr", ".grib", ".h5", ".hdf", ".mpg", ".mpeg")  # formats that Pillow identifies but can't decode
MOST_REASONS = 8
UNKNOWN = (None, -1, "")  # labels of images without a class
PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
ARCHIVES = (".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")


@dataclass
class Inventory:
    """What a folder holds.

    Args:
        folder: the folder.
        kind: "images", a suffix of `TABLES`, "saved" (by `save_to_disk`) or None if there is nothing to take.
        train, held_out: the files of the training split and of the test (else validation) split, sorted.
        held_out_name: the name of the latter split.
        classes: the names of the classes of `train`, in natural order; None: no class folders.
        class_of: file -> the name of its class, if it is in a class folder.
        below: file -> its path below the folder of its split.
        metadata: the metadata files of images.
        searched: the folders in which files would be taken.
        left_out: reason -> the number of files or folders left out for it.
    """

    folder: Path
    kind: str | None = None
    train: list[Path] = field(default_factory=list)
    held_out: list[Path] = field(default_factory=list)
    held_out_name: str | None = None
    classes: list[str] | None = None
    class_of: dict[Path, str] = field(default_factory=dict)
    below: dict[Path, str] = field(default_factory=dict)
    metadata: list[Path] = field(default_factory=list)
    searched: list[Path] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)

    def left_out_in_words(self) -> str:
        """The reasons with their numbers, most frequent first: "3 .dcm, 2 .heic (`pip install pillow-heif`)"."""
        singular = functools.partial(re.sub, "^(folder|file|image|link|localizer|row)s", r"\1")
        most = self.left_out.most_common(MOST_REASONS)
        words = [f"{number} {reason if number > 1 else singular(reason)}" for reason, number in most]
        more = len(self.left_out) - MOST_REASONS
        return ", ".join(words + [f"files of {more} more kind{'s' * (more > 1)}"] * (more > 0))


def take_inventory(folder: Path) -> Inventory:
    """List what is taken from a folder, and count by reason what is not.

    Links to files and folders are followed. A folder to which several paths lead is taken once, and a link to a folder
    that contains it is left out.

    Raises:
        ValueError: the names leave open which files are for training.
    """
    inventory = Inventory(folder)
    is_saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    if is_saved or (folder / "dataset_dict.json").is_file():
        inventory.kind = "saved"
        return inventory
    files = {ZIP: [folder]} if is_zip(folder) else _by_kind(_walk(folder, inventory.left_out), inventory)
    inventory.kind = _kind_to_take(folder, files)
    if inventory.kind in TABLES:
        _split_tables(inventory, sorted(files[inventory.kind]))
    elif inventory.kind == "images":
        _split_images(inventory, {file: file.relative_to(folder).parts for file in sorted(files["images"])})
    elif inventory.kind == ZIP:
        inventory.kind = _take_archives(inventory, sorted(files.pop(ZIP)))
    if inventory.kind != "images":
        inventory.left_out.update(file.suffix for file in inventory.metadata)
    for kind, others in files.items():
        if others and kind != inventory.kind:
            reason = f"images beside {inventory.kind} files" if kind == "images" else kind
            inventory.left_out[f"{ZIP} beside {inventory.kind}" if kind == ZIP else reason] += len(others)
    return inventory


def _by_kind(folders: Iterable[tuple[Path, list[Path]]], inventory: Inventory) -> dict[str, list[Path]]:
    """The files in these folders that can be taken: the images, and tables and archives by their suffixes."""
    found = {kind: [] for kind in ("images", *TABLES, ZIP)}
    for here, files in folders:
        inventory.searched.append(here)
        for file in files:
            suffix = file.suffix.lower()
            if file.name.lower() in METADATA:
                inventory.metadata.append(file)
            elif suffix in found:
                found[suffix].append(file)
            elif _is_image(file):
                found["images"].append(file)
            else:
                inventory.left_out[_kind(suffix)] += 1
    return found


def mark_of(folder: str | Path) -> str | None:
    """The name of a file that marks the folder as output of this package, or None."""
    return next((name for name in MARKS if os.path.isfile(os.path.join(folder, name))), None)


def natural_order(names) -> list[str]:
    """The names sorted with their numbers by value: "2" before "10"."""

    def key(name: str):
        parts = enumerate(re.split(r"(\d+)", name))  # text and digits in turn
        return [(len(part.lstrip("0")), part.lstrip("0")) if k % 2 else part for k, part in parts], name

    return sorted(names, key=key)


def _is_image(file: Path) -> bool:
    suffix = file.suffix.lower()
    if suffix in ("", ".gz") or suffix[1:].isdigit():  # which does not tell
        return is_image_file(file)
    return suffix not in HEADERS_ONLY and _is_suffix_of_images(suffix)


@functools.cache
def _is_suffix_of_images(suffix: str) -> bool:
    return is_image_file(Path(f"x{suffix}"))


def _kind(suffix: str) -> str:
    """The reason for leaving out files with this suffix."""
    if suffix in PLUGINS:
        return f"{suffix} (`pip install {PLUGINS[suffix]}`)"
    if suffix in ARCHIVES:
        return f"{suffix} (unpack it)"
    return suffix if re.fullmatch(r"\.(?!\d+$)[\w-]{1,10}", suffix) and suffix.isascii() else "without a known suffix"


def _walk(folder: Path, left_out: Counter) -> Iterator[tuple[Path, list[Path]]]:
    """The folders with training data, from `folder` down, each with its files, sorted.

    Hidden files and folders, and folders marked by `MARKS` with all below them, are left out.
    """
    seen, top = set(), folder.resolve()
    folders, links = deque([folder]), deque()
    while folders or links:  # links last: a folder is taken under its own path if it has one here
        here, is_link = (folders.popleft(), False) if folders else (links.popleft(), True)
        try:
            status = os.stat(here)
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError:
            left_out["folders that can't be read"] += 1
            continue
        if (status.st_dev, status.st_ino) in seen or (is_link and top.is_relative_to(here.resolve())):
            left_out["links to folders that are taken already"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        files = []
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in JUNK:
                continue
            of_link, path = entry.is_symlink(), here / entry.name
            if os.path.isdir(path) if of_link else entry.is_dir():
                if mark := mark_of(path):
                    left_out[f"folders of {MARKS[mark]}"] += 1
                else:
                    (links if of_link else folders).append(path)
            elif os.path.isfile(path) if of_link else entry.is_file():
                files.append(path)
            else:
                left_out["links to nothing" if of_link else "of no regular kind of file"] += 1
        yield here, files


def _folders_in_zip(archive: Path, inventory: Inventory) -> Iterator[tuple[Path, list[Path]]]:
    """As `_walk`, the folders in an archive, each with its files."""
    folders, marks = {}, {}
    for file in list_files(archive, inventory.left_out):
        inside = file.relative_to(archive).parts
        if not any(name.startswith(".") or name.lower() in JUNK for name in inside):
            folders.setdefault(file.parent, []).append(file)
            if file.name in MARKS and file.parent != inventory.folder:
                marks.setdefault(file.parent, MARKS[file.name])
    for here in sorted(folders, key=lambda folder: (len(folder.parts), folder)):
        above = [place for place in (here, *here.parents) if place in marks]
        if not above:
            yield here, sorted(folders[here])
        elif above == [here]:
            inventory.left_out[f"folders of {marks[here]}"] += 1


def _take_archives(inventory: Inventory, archives: list[Path]) -> str | None:
    """Take the images in the archives, each as if it were unpacked in its place, and return the kind of the inventory.

    An archive that is named after a split is that split, unless folders in it are named after splits.
    """
    searched, paths = inventory.searched.copy(), {}
    for archive in archives:
        try:
            found = _by_kind(_folders_in_zip(archive, inventory), inventory)
        except ValueError:
            inventory.left_out[f"{ZIP} that is damaged"] += 1
            continue
        inside = {file: file.relative_to(archive).parts for file in found.pop("images")}
        inventory.left_out.update(f"{file.suffix.lower()} in a .zip" for files in found.values() for file in files)
        if not inside:
            continue
        split = _split_of_file(archive.name)
        depth = _common(list(inside.values()), split)
        has_splits = any(len(path) > depth + 1 and _split_of_folder(path[depth]) for path in inside.values())
        above = archive.relative_to(inventory.folder).parts[:-1] + ((split,) if split and not has_splits else ())
        paths |= {file: above + path for file, path in inside.items()}
    inventory.searched = searched  # no file can be put into an archive
    if paths:
        _split_images(inventory, dict(sorted(paths.items(), key=lambda each: (each[1], each[0]))))
    return "images" if paths else None


def _split_of_folder(name: str) -> str | None:
    """The split that a folder is named after: `Train`, `train`, `val2017`."""
    return WORDS.get(re.sub(r"[\W\d_]+$", "", name.lower()))


def _split_of_table(path: Path) -> str | None:
    """The split that a table is named after, by a folder or its own name: `test/0000.parquet`, `a_train-1.parquet`."""
    return next(filter(None, map(_split_of_folder, path.parts[:-1])), None) or _split_of_file(path.name)


def _split_of_file(name: str) -> str | None:
    """The split that a table or an archive is named after."""
    words = re.findall(r"[^\W\d_]+", Path(name).stem.lower())
    start = next((split for split in ("train", "test") if name.lower().startswith(split)), None)
    return next(filter(None, map(WORDS.get, words)), start)


def _kind_to_take(folder: Path, found: dict[str, list[Path]]) -> str | None:
    if any(_split_of_table(file.relative_to(folder)) == "train" for file in found.get(".parquet", ())):
        return ".parquet"
    return next((kind for kind, files in found.items() if files), None)


def _choose_held_out(inventory: Inventory, splits: dict[str | None, list[Path]], what: str) -> None:
    """Take the training split and one to hold out, and count the others as left out."""
    name = next((name for name in ("test", "validation") if splits.get(name)), None)
    inventory.train, inventory.held_out_name = splits["train"], name
    inventory.held_out = splits[name] if name else []
    if name == "test" and splits.get("validation"):
        inventory.left_out[f"{what} of a validation split (the test split is held out)"] += len(splits["validation"])
    if splits.get(None):
        inventory.left_out[f"{what} beside the training split"] += len(splits[None])


def _split_tables(inventory: Inventory, files: list[Path]) -> None:
    """Assign tables to splits. Those in other folders than the nearest training split are left out."""
    splits = {}
    for file in files:
        splits.setdefault(_split_of_table(file.relative_to(inventory.folder)), []).append(file)
    if "train" not in splits:
        splits["train"] = splits.pop(None, [])
    if not splits["train"]:
        raise ValueError(
            f"train_data_dir={str(inventory.folder)!r} has {inventory.kind} files of a test or validation split only, "
            f"such as {files[0].name!r}: name the ones for training train*{inventory.kind}"
        )
    homes = {_home(file, inventory.folder) for file in splits["train"]}
    least = min(map(len, homes))
    nearest = natural_order("/".join(home) for home in homes if len(home) == least)
    if len(nearest) > 1:
        raise ValueError(
            f"train_data_dir={str(inventory.folder)!r} has {inventory.kind} files in the folders {nearest[0]!r} and "
            f"{nearest[1]!r}: give one of them as --train_data_dir"
        )
    for split, of_split in splits.items():
        splits[split] = [f for f in of_split if "/".join(_home(f, inventory.folder)) == nearest[0]]
        if elsewhere := len(of_split) - len(splits[split]):
            inventory.left_out[f"{inventory.kind} in other folders"] += elsewhere
    _choose_held_out(inventory, splits, inventory.kind)


def _home(file: Path, folder: Path) -> tuple[str, ...]:
    """The folders in which a table lies, without those that name a split."""
    return tuple(part for part in file.relative_to(folder).parts[:-1] if not _split_of_folder(part))


def _split_images(inventory: Inventory, parts: dict[Path, tuple[str, ...]]) -> None:
    """Assign images, in the order of `parts`, to splits and classes; these are the parts of their paths."""
    depth = _common(list(parts.values()), "train")
    splits, paths = {}, {}
    for file, path in parts.items():
        split = _split_of_folder(path[depth]) if len(path) > depth + 1 else None
        splits.setdefault(split, []).append(file)
        paths[file] = path[depth + 1 :]
    if "train" in splits:
        _choose_held_out(inventory, splits, "images")
        tops = {parts[file][: depth + 1] for file in (*inventory.train, *inventory.held_out)}
        roots = [inventory.folder.joinpath(*top) for top in tops]
        inventory.searched = [f for f in inventory.searched if any(f.is_relative_to(root) for root in roots)]
    elif None not in splits and len(splits) > 1:
        raise ValueError(
            f"train_data_dir={str(inventory.folder)!r} has images of a test and of a validation split and none to "
            "train on: name their folder train"
        )
    else:
        inventory.train, paths = list(parts), parts
    inventory.below = {file: "/".join(path) for file, path in paths.items()}
    _find_classes(inventory, paths)


def _common(paths: list[tuple[str, ...]], stop: str | None = None) -> int:
    """The number of folders that all paths begin with, but for a folder named as the split `stop` and those below."""
    depth, first = 0, min(paths, key=len)
    while (
        depth + 1 < len(first)
        and all(path[depth] == first[depth] for path in paths)
        and (stop is None or _split_of_folder(first[depth]) != stop)
    ):
        depth += 1
    return depth


def _find_classes(inventory: Inventory, paths: dict[Path, tuple[str, ...]]) -> None:
    """The first folders that differ among the paths of training images are classes."""
    trained = [paths[file] for file in inventory.train]
    common = trained[0][: _common(trained)]
    for file in (*inventory.train, *inventory.held_out):
        if paths[file][: len(common)] == common and len(paths[file]) > len(common) + 1:
            inventory.class_of[file] = paths[file][len(common)]
    names = {inventory.class_of[file] for file in inventory.train if file in inventory.class_of}
    inventory.classes = natural_order(names) if len(names) > 1 else None
