"""The images of a data set as they are stored (mostly uint8), and batches of them in [-1, 1]."""

import logging
import os
import zlib
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Subset

from ddpm_hf.data.config import EARLIER_SPLIT, EMBEDDED_DIGITS, DataConfig
from ddpm_hf.data.decoding import Decoder
from ddpm_hf.data.missing import split_missing
from ddpm_hf.data.order import Order
from ddpm_hf.data.pages import EIGHT_BITS
from ddpm_hf.data.sources import source_of
from ddpm_hf.data.split import HELD_OUT_LIMIT, random_split, shared, stratified_split
from ddpm_hf.data.store import Pixels, decode_all
from ddpm_hf.utils.arguments import show
from ddpm_hf.utils.seeds import seeded_generator

log = logging.getLogger(__name__)


class BadImages(ValueError):  # noqa: N818
    """More images than `max_bad_fraction` are broken. `bad` lists them as (name, reason)."""

    def __init__(self, bad: list[tuple[str, str]], seen: int, allowed: float):
        super().__init__(
            f"{len(bad)} of {seen} images can't be used, more than max_bad_fraction={allowed:g}; the first one: "
            + " ".join(bad[0])
        )
        self.bad = bad


@dataclass
class ImageData:
    """Images in memory, or mapped into it from the disk.

    Args:
        pixels: (N, C, H, W), uint8 or float32; missing values are NaN.
        value_range: the pixel values that become -1 (black) and 1 (white).
        labels: (N,) int64, the classes, -1 for an image without one; None for a data set without classes.
        label_names: the names of the classes.
        bad: (name, reason) of the skipped images, those of the held-out split included.
        license: the licence of the data set, if known.
        window: (height, width) of the windows of the images that a network sees; None: it sees whole images.
        class_balance: see `Order`.
        fill: what takes the place of missing values, in [-1, 1]; None if none can be missing.
        has_alpha: whether the last channel is opacity.
        no_classes: why the data set has no classes, if that is not plain.
    """

    pixels: torch.Tensor | Pixels
    value_range: tuple[float, float] = EIGHT_BITS
    labels: torch.Tensor | None = None
    label_names: list[str] | None = None
    bad: list[tuple[str, str]] = field(default_factory=list)
    license: str | None = None
    window: tuple[int, int] | None = None
    class_balance: float = 0.0
    fill: float | None = None
    has_alpha: bool = False
    no_classes: str = ""

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what a network sees."""
        return self.pixels.shape[1], *(self.window or self.pixels.shape[2:])

    def order_classes(self, names: list[str] | None) -> None:
        """Number the classes as in `names` if these are the same names in another order."""
        if self.label_names and names and sorted(names) == sorted(self.label_names):
            numbers = torch.tensor([*map(names.index, self.label_names), -1])  # label -1 is the last entry
            self.labels, self.label_names = numbers[self.labels], list(names)

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices (B,) -> images (B, C, H, W), float32 in [-1, 1]; a window is at the same place each time."""
        return self.batch_and_valid(indices)[0]

    def batch_and_valid(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `batch`, and where values are not missing, bool (B, C, H, W); None if none can be."""
        return split_missing(self._batch(indices), self.fill)

    def _batch(self, indices: torch.Tensor, corners: torch.Tensor | None = None) -> torch.Tensor:
        """As `batch`, but missing values are NaN. `corners` (B, 2) are the places of the windows, see `windows`."""
        pixels = self.pixels.index_select(0, indices)
        if self.window:
            pixels = windows(pixels, self._corners[indices] if corners is None else corners, self.window)
        return normalized(pixels, self.value_range)

    @cached_property
    def _corners(self) -> torch.Tensor:
        return torch.rand((len(self), 2), generator=seeded_generator(0, "window"), dtype=torch.float64)

    def cropped(self) -> "ImageData":
        """The windows as images: one of each image, as from `batch`."""
        if not self.window:
            return self
        parts = zip(self.pixels.split(1024), self._corners.split(1024), strict=True)
        pixels = torch.cat([windows(images, corners, self.window) for images, corners in parts])
        return replace(self, pixels=pixels, window=None)

    @cached_property
    def levels(self) -> int:
        """The number of values of a pixel: the integers in `value_range`, or 256 if pixels are not integers."""
        parts = () if self.pixels.dtype == torch.uint8 else self.pixels.split(1024)
        whole = all(((part == part.round()) | part.isnan()).all() for part in parts)
        low, high = self.value_range
        return int(high - low) + 1 if whole and float(high - low).is_integer() else 256

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the images: their number and a checksum of their pixels."""
        checksum = 0
        for part in self.pixels.split(1024):
            checksum = zlib.crc32(part.numpy(), checksum)
        return f"{len(self)} images {checksum:08x}"

    @property
    def num_images(self) -> int:
        return len(self)

    @cached_property
    def order(self) -> Order:
        """The order in which a run sees the images."""
        return Order(len(self), self.labels, self.class_balance)

    def first(self, n: int, seed: int) -> torch.Tensor:
        """The first `n` images that a run with this seed trains on, or N if there are fewer; as from `batch`."""
        return self.batch(self.order.indices(seed, 0, min(n, len(self))))

    def batch_for_step(self, seed: int, step: int, batch_size: int, rows: torch.Tensor, corners=None):
        """The images at positions `rows` of the global batch of update `step`, and their labels or None.

        The images are as from `batch`, except that missing values are NaN, for `split_missing`, and windows are at
        `corners` (B, 2), see `windows`.
        """
        indices = self.order.indices(seed, step, batch_size)[rows]
        return self._batch(indices, corners), None if self.labels is None else self.labels[indices]


def normalized(pixels: torch.Tensor, value_range: tuple[float, float]) -> torch.Tensor:
    """Convert to float32 and scale `value_range` to [-1, 1]."""
    low, high = value_range
    return pixels.to(torch.float32, copy=True).sub_(low).mul_(2 / (high - low)).sub_(1)  # copies once


def windows(images: torch.Tensor, corners: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Cut a window of `size` (height, width) out of each image (B, C, H, W).

    Args:
        corners: (B, 2) in [0, 1): the place of the window, from the top to the bottom and from the left to the right.
    """
    height, width = size
    ways = torch.tensor(images.shape[2:]) - torch.tensor(size) + 1
    places = (corners * ways).long().tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(images, places, strict=True)])


def load_images(config: DataConfig, test_limit: int | None = HELD_OUT_LIMIT) -> tuple[ImageData, ImageData | None]:
    """Load the training images and the held-out images: the test split, or else a tenth of the training images.

    At most `test_limit` evenly spaced images of a test split are used; None: all. Without a test split,
    `data/split.py` says which images are held out, perhaps none. With `random_crop`, training images are larger than
    what a network sees, and held-out images are windows, one of each. Broken files are skipped and listed in `bad`.

    Raises:
        BadImages: more than `max_bad_fraction` are broken.
        ValueError: the data set does not exist, is empty or has images of several sizes, or the settings do not fit an
            image; the message names the file.
    """
    if has_embedded_digits(config):
        return _digits(config)
    train, test, label_names = source_of(config)
    license, no_classes = getattr(train, "license", None), getattr(train, "no_classes", "")
    if not len(test) and config.held_out_split == EARLIER_SPLIT:
        train, test = (Subset(train, indices.tolist()) for indices in random_split(len(train)))
    elif test_limit is not None and len(test) > test_limit:
        test = Subset(test, np.linspace(0, len(test) - 1, test_limit).astype(int).tolist())
    decoder = decoder_of(config)
    images, traits, bad = collect(train, decoder, config, label_names)
    held_out, traits_of_test, bad_too = collect(test, decoder, config, label_names)
    seen = len(train) + len(test)
    if not len(train):
        raise ValueError(f"{config.train_data_dir or config.dataset_name!r} has no training images")
    if len(bad + bad_too) > config.max_bad_fraction * seen or images is None:
        raise BadImages(bad + bad_too, seen, config.max_bad_fraction)
    if len(test):
        _warn_of_shared(*shared(traits, traits_of_test), len(test))
    else:
        images, held_out = _separate(images, *stratified_split(traits, images.labels))
        if held_out is None and len(images) > 1:
            _log("no image is held out: each class has a single image, or all images are of one group or copies")
    images.bad, images.license, images.no_classes = bad + bad_too, license, no_classes
    images.window = window_of(config)
    if held_out is not None:
        held_out = replace(held_out, window=images.window).cropped()
    if config.value_range and tuple(config.value_range) != images.value_range:
        raise ValueError(
            f"value_range={config.value_range} is for images of more than 8 bits; these have 8 bits, so leave it out"
        )
    return images, held_out


def collect(items, decoder: Decoder, config: DataConfig, label_names: list[str] | None, keep: bool = True):
    """The `ImageData` of items, None if none can be decoded, and what else `decode_all` returns."""
    workers = config.dataloader_num_workers
    found, traits, bad = decode_all(items, decoder, workers, config.cache_dir, keep and len(items) > 0)
    if found is None:
        return None, traits, bad
    labels = found.pop("labels")
    return ImageData(**found, labels=labels if label_names else None, label_names=label_names), traits, bad


def _separate(images: ImageData, train: torch.Tensor, aside: torch.Tensor) -> tuple[ImageData, ImageData | None]:
    """The images at the indices `train` and `aside`."""

    def part(rows: torch.Tensor) -> ImageData:
        labels = None if images.labels is None else images.labels[rows]
        return replace(images, pixels=images.pixels.select(rows), labels=labels)

    return part(train), part(aside) if len(aside) else None


def _warn_of_shared(copies: int, of_groups: int, number: int) -> None:
    """Log that the images held out, `number` in all, are not independent of the training images."""
    what = [f"{copies} have exactly the pixels of a training image"] * bool(copies)
    what += [f"{of_groups} are of a group that has training images"] * bool(of_groups)
    if what:
        _log(f"of {number} held-out images, {' and '.join(what)}: measured on them, the model seems better than it is")


def _log(warning: str) -> None:
    """Log a warning in the main process of a launcher."""
    if os.environ.get("RANK", "0") == "0":
        log.warning(warning)


def has_embedded_digits(config: DataConfig) -> bool:
    return config.train_data_dir is None and config.dataset_name == EMBEDDED_DIGITS


def window_of(config: DataConfig) -> tuple[int, int] | None:
    """(height, width) of the windows that a network sees; None: whole images."""
    return config.image_size if config.random_crop else None


def decoder_of(config: DataConfig) -> Decoder:
    return Decoder(
        config.channels,
        config.stored_size,
        tuple(config.value_range) if config.value_range else None,
        config.background,
        config.frames,
        config.slices,
        config.resize,
        config.nodata,
        config.nodata_fill,
        config.clip_values,
        config.alpha_channel,
    )


def _digits(config: DataConfig) -> tuple[ImageData, ImageData]:
    from sklearn.datasets import load_digits  # takes a second to import

    if config.channels not in (None, 1) or config.value_range is not None:
        raise ValueError("the embedded digits have channels=1 and value_range 0 ... 16: leave both settings out")
    if config.random_crop is not None:
        raise ValueError(f"random_crop={config.random_crop}: the embedded digits have 8x8 pixels; leave it out")
    if config.group_by is not None:
        raise ValueError(f"group_by={show(config.group_by)}: the embedded digits have no groups; leave it out")
    if config.image_column is not None or config.label_column is not None:
        raise ValueError("the embedded digits have no columns: leave image_column and label_column out")
    if config.streaming:
        raise ValueError("streaming=True: the embedded digits are in memory already; leave it out")
    digits = load_digits()
    pixels, labels = torch.from_numpy(digits.images.astype(np.uint8))[:, None], torch.from_numpy(digits.target)
    if config.image_size not in (None, (8, 8)):
        decoder = Decoder(1, config.image_size, resize=config.resize)
        pixels = torch.stack([torch.from_numpy(decoder(p[0].numpy()).pixels) for p in pixels])
    names = [str(name) for name in digits.target_names]
    train, held_out = (ImageData(pixels[p], (0.0, 16.0), labels[p], names) for p in random_split(len(pixels)))
    train.license = "CC BY 4.0 (UCI, Optical Recognition of Handwritten Digits)"
    return train, held_out
