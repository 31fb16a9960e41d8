"""Keeps decoded images on the disk, in the cache of `datasets`, so that a machine decodes a data set once.

They are found again by a key: a hash of what was read (paths, sizes and dates of files, or the fingerprint of a
`datasets.Dataset`), of the settings of the decoder, and of the code that decodes. The files are mapped into memory,
which all processes of a machine share.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import torch
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import Subset
from tqdm.auto import tqdm

from ddpm_hf.data.decoding import Decoder
from ddpm_hf.data.frames import Frames
from ddpm_hf.data.pages import BadImage
from ddpm_hf.data.sources import Rows, version_of
from ddpm_hf.data.split import Traits, digest
from ddpm_hf.data.workers import decode_each
from ddpm_hf.utils.arguments import parse_json
from ddpm_hf.utils.files import os_errors_of

# A row an image. A broken one has a name and a reason; the others have a kind, what `Decoded` says of them, as JSON.
FEATURES = datasets.Features(
    {
        "pixels": datasets.Value("large_binary"),
        "kind": datasets.Value("string"),
        "digest": datasets.Value("binary"),
        "name": datasets.Value("string"),
        "reason": datasets.Value("string"),
    }
)
ROWS_AT_A_TIME = 32  # that are in memory before they are written
DECODERS = ("pillow", "tifffile", "imagecodecs", "numpy", "torch", "pydicom", "nibabel", "pillow-heif",
            "pillow-jxl-plugin")  # fmt: skip
log = logging.getLogger(__name__)


class Pixels:
    """Images (N, C, H, W) that lie in several arrays and are read like a tensor.

    Args:
        pieces: arrays (n, C, H, W).
        rows: which images, counted over all pieces, and in which order; None: all.
    """

    def __init__(self, pieces: Sequence[np.ndarray], rows: np.ndarray | None = None):
        self.pieces, self.starts = pieces, np.cumsum([0, *map(len, pieces)])
        self.rows = np.arange(self.starts[-1]) if rows is None else rows
        self.shape = torch.Size([len(self.rows), *pieces[0].shape[1:]])
        self.dtype = torch.from_numpy(np.empty(0, pieces[0].dtype)).dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key) -> torch.Tensor:
        """As that of a tensor: `pixels[3]`, `pixels[:10, 0]`."""
        first, *others = key if isinstance(key, tuple) else (key,)
        places = torch.arange(len(self))[first]
        images = self.index_select(0, places.reshape(-1))
        return images[(slice(None) if places.ndim else 0, *others)]

    def index_select(self, dim: int, indices: torch.Tensor) -> torch.Tensor:
        """The images at `indices` (n,), copied; `dim` is 0."""
        rows = self.rows[indices.numpy()]
        pieces = np.searchsorted(self.starts, rows, "right") - 1
        found = np.empty((len(rows), *self.shape[1:]), self.pieces[0].dtype)
        for k, (piece, place) in enumerate(zip(pieces.tolist(), (rows - self.starts[pieces]).tolist(), strict=True)):
            found[k] = self.pieces[piece][place]
        return torch.from_numpy(found)

    def split(self, size: int) -> Iterator[torch.Tensor]:
        """All images, `size` at a time, copied."""
        return (self.index_select(0, indices) for indices in torch.arange(len(self)).split(size))

    def select(self, indices: torch.Tensor) -> "Pixels":
        """The images at `indices` (n,), not copied."""
        return Pixels(self.pieces, self.rows[indices.numpy()])


def decode_all(items, decoder: Decoder, workers: int, cache_dir: str | None = None, keep: bool = True):
    """Decode all items, or read what was decoded before. The first image sets what `decoder` leaves open.

    Args:
        items: a sequence of `Item`s.
        workers: the number of processes that decode; 0: this one.
        cache_dir: the folder of the cache; None: that of `datasets`.
        keep: whether to keep the images on the disk; else they are in memory.

    Returns:
        What a dict says of the images: `pixels`, `value_range`, `fill`, `has_alpha` and `labels` (N,), -1 for none, as
        in `ImageData`; None if no item can be decoded. Further `Traits`, and (name, reason) of each broken item.
    """

    def rows() -> Iterator[dict]:
        for item, image in _with_bar(decode_each(items, decoder, workers), len(items)):
            if isinstance(image, BadImage):
                yield {**dict.fromkeys(FEATURES), "name": str(item), "reason": str(image)}
                continue
            kind = {"shape": image.pixels.shape, "dtype": image.pixels.dtype.name, "deep": image.deep}
            kind |= {"value_range": image.value_range, "fill": image.fill, "has_alpha": image.has_alpha}
            row = {"pixels": image.pixels.tobytes(), "kind": json.dumps(kind)}
            yield {**dict.fromkeys(FEATURES), **row, "digest": digest(image.pixels, item.name)}

    if keep:
        table = _kept(rows, _key(items, decoder), cache_dir)
    else:
        table = pyarrow.Table.from_pylist(list(rows()), FEATURES.arrow_schema)
    is_bad = pyarrow.compute.is_null(table["kind"])
    bad = [(row["name"], row["reason"]) for row in table.select(["name", "reason"]).filter(is_bad).to_pylist()]
    marks = [mark for mark, out in zip(_marks(items), is_bad.to_pylist(), strict=True) if not out]
    copies = np.frombuffer(b"".join(table["digest"].drop_null().to_pylist()), ">u8").astype(np.uint64)
    traits = Traits(copies, [group for _, group in marks])
    if not marks:
        return None, traits, bad
    kind = parse_json(table["kind"].drop_null()[0].as_py())
    decoder.hold_to(kind["deep"], tuple(kind["shape"]), kind["has_alpha"])
    found = {"pixels": Pixels(_views(table["pixels"], kind)), "value_range": tuple(kind["value_range"])}
    labels = torch.tensor([-1 if label is None else label for label, _ in marks])
    found |= {name: kind[name] for name in ("fill", "has_alpha")}
    return {**found, "labels": labels}, traits, bad


def _views(column: pyarrow.ChunkedArray, kind: dict) -> list[np.ndarray]:
    """The images (n, C, H, W) in each chunk of a column of bytes, which are not copied."""
    buffers = [chunk.buffers()[2] for chunk in column.chunks if len(chunk) > chunk.null_count]
    return [np.frombuffer(buffer, kind["dtype"]).reshape(-1, *kind["shape"]) for buffer in buffers]


def _with_bar(each: Iterator, total: int) -> tqdm:
    hidden = os.environ.get("LOCAL_RANK", "0") != "0"
    return tqdm(each, total=total, desc="decoding", unit=" images", delay=2, leave=False, disable=hidden)


def _kept(rows: Callable[[], Iterator[dict]], key: str, cache_dir: str | None) -> pyarrow.Table:
    """The table of `rows` under this key: from the disk, or made now, by one process while others wait for it."""
    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    folder = root / "generator" / f"default-fingerprint={key}"
    make = functools.partial(_make, rows, key, str(root))
    was_there = folder.is_dir()
    with os_errors_of(root):
        try:
            table = make()
        except (OSError, pyarrow.ArrowException, json.JSONDecodeError) as error:
            if getattr(error, "errno", None) is not None:  # of the disk, and not of the content of a file
                raise
            log.warning(f"the decoded images in {folder} are damaged and are decoded again: {error}")
            shutil.rmtree(folder)
            table = make()
    size = f"{table.nbytes / 1e6:,.1f} MB"
    if was_there:
        log.info(f"{len(table)} decoded images of {size} are read from {folder}")
    else:
        log.info(f"{len(table)} decoded images of {size} are kept in {folder}; --cache_dir chooses another folder")
    return table


def _make(rows: Callable[[], Iterator[dict]], key: str, root: str) -> pyarrow.Table:
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # ours tells how many images there are
    try:
        options = {"features": FEATURES, "cache_dir": root, "fingerprint": key, "writer_batch_size": ROWS_AT_A_TIME}
        return datasets.Dataset.from_generator(rows, **options).data.table
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def _key(items, decoder: Decoder) -> str:
    """A hash of all that the decoded images depend on."""
    parts = hashlib.sha256()
    for part in (_code(), asdict(decoder), *_identity(items)):
        parts.update(f"{part!r}\n".encode())
    return parts.hexdigest()[:32]


@functools.cache
def _code() -> list:
    """The code of this folder and the versions of the packages that decode."""
    versions = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions() if dist.name}
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return [*code, *(versions.get(name) for name in DECODERS)]


def _identity(items) -> Iterator:
    """What tells the content of the items, without reading their files."""
    if isinstance(items, Subset):
        yield from _identity(items.dataset)
        yield list(items.indices)
    elif isinstance(items, Frames):
        yield from _identity(items.items)
    elif isinstance(items, Rows):
        yield from items.identity()
    else:
        for item in items:
            yield item.name, item.frame, version_of(item.source)


def _marks(items) -> Iterator[tuple[int | None, str | None]]:
    """The class and the group of each item. They are not kept on the disk: a group may be a patient."""
    if isinstance(items, Subset):
        marks = list(_marks(items.dataset))
        return (marks[k] for k in items.indices)
    return items.marks() if isinstance(items, Rows) else ((item.label, item.group) for item in items)
