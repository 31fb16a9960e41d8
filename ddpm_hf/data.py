"""From files and data sets to batches in [-1, 1]. Images are decoded once and kept as they are stored: mostly uint8."""

import io
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpm_hf.config import EMBEDDED_DIGITS, TrainConfig

HELD_OUT_FRACTION, HELD_OUT_LIMIT, HELD_OUT_SEED = 0.1, 1024, 0
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I", "F")  # gray of more than 8 bits


@dataclass
class ImageData:
    """Images in memory.

    Args:
        pixels: (N, C, H, W), uint8 or float32.
        value_range: the pixel values that become -1 (black) and 1 (white).
    """

    pixels: torch.Tensor
    value_range: tuple[float, float]

    def __post_init__(self):
        _check_range("pixels", self.pixels, *self.value_range)

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices (B,) -> images (B, C, H, W), float32 in [-1, 1]."""
        low, high = self.value_range
        return (self.pixels[indices].float() - low) * (2 / (high - low)) - 1


def batch_indices(seed: int, step: int, batch_size: int, num_images: int) -> torch.Tensor:
    """Which images update `step` sees, (batch_size,): the next ones of an endless row of shuffled epochs.

    A function of its arguments alone, so a resumed run or a second process needs to be told nothing.
    """
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // num_images
    order = torch.cat([_shuffled(seed, epoch, num_images) for epoch in epochs.unique().tolist()])
    return order[positions - epochs[0] * num_images]


@lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, num_images: int) -> torch.Tensor:
    return torch.randperm(num_images, generator=seeded_generator(seed, "order", epoch))


def stream_seed(seed: int, purpose: str, index: int) -> int:
    """A seed in 0 ... 2^63 - 1 that depends on all three and that no other purpose or index shares."""
    words = np.random.SeedSequence([seed, index, *purpose.encode()]).generate_state(2)
    return int(words[0]) << 31 ^ int(words[1])


def seeded_generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A generator of that seed."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, index))


def load_images(config: TrainConfig) -> tuple[ImageData, ImageData | None]:
    """The images to train on, and those to measure on: the test split, or a tenth kept aside (None of a single image).

    Raises:
        ValueError: a source that is missing, empty or of unequal images, an image that can't be read or whose values
            leave the range; it names the file and says what would be right.
    """
    if config.train_data_dir is None and config.dataset_name == EMBEDDED_DIGITS:
        from sklearn.datasets import load_digits  # not worth a second at every import

        if config.channels not in (None, 1) or config.value_range is not None:
            raise ValueError("the embedded digits have channels=1 and value_range 0 ... 16: set neither for them")
        digits = load_digits().images.astype(np.uint8)
        train, test, value_range = [(f"digit {k}", digit) for k, digit in enumerate(digits)], [], (0.0, 16.0)
    elif config.train_data_dir is None and config.dataset_name is None:
        raise ValueError(
            f"config={config.config!r} has no data set of its own: give --train_data_dir or --dataset_name"
        )
    else:
        train, test = _folder(config.train_data_dir) if config.train_data_dir else _hub(config)
        value_range = config.value_range

    if not len(test):
        order = torch.randperm(len(train), generator=seeded_generator(HELD_OUT_SEED, "held out", 0)).tolist()
        aside = min(max(1, round(len(train) * HELD_OUT_FRACTION)), HELD_OUT_LIMIT) if len(train) > 1 else 0
        test, train = [train[k] for k in sorted(order[:aside])], [train[k] for k in sorted(order[aside:])]
    elif len(test) > HELD_OUT_LIMIT:
        test = [test[int(k)] for k in np.linspace(0, len(test) - 1, HELD_OUT_LIMIT)]
    decoder = _Decoder(config.channels, config.resolution, value_range)
    return decoder.decode_all(train), decoder.decode_all(test) if test else None


def _folder(path: str):
    """Two lists of (name, content): the parquet files' rows, or the files of images."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"train_data_dir={path!r} is not a folder; it must be one that holds images or train*.parquet")
    parquet = {split: sorted(map(str, folder.glob(f"{split}*.parquet"))) for split in ("train", "test")}
    if parquet["train"]:
        import datasets

        try:
            loaded = datasets.load_dataset("parquet", data_files={k: v for k, v in parquet.items() if v})
        except Exception as error:  # datasets, pyarrow and the disk all raise their own
            raise ValueError(f"train_data_dir={path!r}: its parquet files can't be read: {error}") from error
        return _Rows(loaded["train"], path), _Rows(loaded["test"], path) if "test" in loaded else []
    extensions = Image.registered_extensions()
    splits = (folder / "train", folder / "test") if (folder / "train").is_dir() else (folder,)
    found = [[(str(f), f) for f in sorted(s.rglob("*")) if f.suffix.lower() in extensions] for s in splits]
    if not found[0]:
        raise ValueError(f"train_data_dir={path!r} holds no image and no train*.parquet")
    return found[0], found[1] if len(found) > 1 else []


def _hub(config: TrainConfig):
    import datasets

    name = config.dataset_name
    try:
        loaded = datasets.load_dataset(name, config.dataset_config_name)
    except Exception as error:  # the Hub, the network, the cache and the data set's own reader all raise their own
        raise ValueError(f"dataset_name={name!r} can't be loaded: {' '.join(str(error).split())}") from error
    if "train" not in loaded:
        raise ValueError(f"dataset_name={name!r} has no split 'train' but {', '.join(loaded)}")
    held_out = next((split for split in ("test", "validation") if split in loaded), None)
    return _Rows(loaded["train"], name), _Rows(loaded[held_out], name) if held_out else []


class _Rows:
    """Rows of a data set as (name, encoded image), found by the type of their column."""

    def __init__(self, dataset, source: str):
        import datasets

        columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        if not columns:
            raise ValueError(f"{source!r} has no column of images: its columns are {', '.join(dataset.features)}")
        self.column, self.source = columns[0], source
        self.dataset = dataset.select_columns(columns[:1]).cast_column(columns[0], datasets.Image(decode=False))

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, k):
        return self._named(k, self.dataset[k])

    def __iter__(self):
        return (self._named(k, row) for k, row in enumerate(self.dataset))

    def _named(self, k, row):
        name, encoded = f"{self.source} row {k}", row[self.column]
        if encoded is None:
            raise ValueError(f"{name} has no image in column {self.column!r}")
        return name, encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])


class _Decoder:
    """Reads images into one shape. What the first image decides where the settings don't, all others must follow."""

    def __init__(self, channels, resolution, value_range):
        self.channels, self.resolution, self.value_range = channels, resolution, value_range
        if channels is not None and channels not in MODES:
            raise ValueError(f"channels={channels} must be 1 (gray), 3 (RGB) or 4 (RGBA)")
        self.inferred, self.shape = False, None

    def decode_all(self, items: Iterable) -> ImageData:
        pixels = torch.stack(list(self._decode_each(items)))
        return ImageData(pixels, tuple(self.value_range))

    def _decode_each(self, items) -> Iterator[torch.Tensor]:
        for name, content in items:
            array = content if isinstance(content, np.ndarray) else self._read(name, content)
            if array.ndim == 2:
                array = array[:, :, None]
            if self.value_range is None:
                self.value_range = (0.0, 255.0)
            _check_range(name, array, *self.value_range)
            dtype = torch.uint8 if array.dtype == np.uint8 else torch.float32
            image = self._fit(torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1))
            if self.shape is None:
                self.shape, self.dtype = image.shape, dtype
            if image.shape != self.shape:
                raise ValueError(
                    f"{name} is {_size(image.shape)} and the first image {_size(self.shape)}; give --resolution"
                )
            if dtype != self.dtype:
                bits = ("8 bits", "more than 8 bits")
                raise ValueError(
                    f"{name} has {bits[dtype != torch.uint8]} and the first image {bits[dtype == torch.uint8]}"
                )
            yield image.round().to(torch.uint8) if self.dtype is torch.uint8 else image

    def _read(self, name, content) -> np.ndarray:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(content)
                image.load()
                image = ImageOps.exif_transpose(image)
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError(f"{name} can't be read as an image: {error}") from error
        except Image.DecompressionBombWarning as error:
            raise ValueError(f"{name} is refused: {error}") from error

        deep = image.mode in DEEP_MODES
        alpha = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
        gray = image.mode in ("1", "L", "LA") or deep
        if self.channels is None:
            self.channels = 4 if alpha else 1 if gray else 3
            self.inferred = True
        if self.inferred and self.channels == 1 and not gray:
            raise ValueError(f"{name} has colour and the first image has none: give channels=1 or channels=3")
        if deep and self.channels != 1:
            raise ValueError(f"{name} is gray of more than 8 bits (mode {image.mode}): channels must be 1")
        if deep and self.value_range is None:
            raise ValueError(
                f"{name} has more than 8 bits (mode {image.mode}, values {np.min(image)} ... {np.max(image)}): "
                "say with --value_range BLACK WHITE which values are black and white"
            )
        if alpha and self.channels != 4:
            raise ValueError(f"{name} has an alpha channel, which channels={self.channels} would lose: give channels=4")
        return np.asarray(image if deep else image.convert(MODES[self.channels]))

    def _fit(self, image: torch.Tensor) -> torch.Tensor:
        """(C, H, W) scaled so that its shorter side is `resolution`, the middle square cut out."""
        side = self.resolution
        if side is None or image.shape[1:] == (side, side):
            return image
        scale = side / min(image.shape[1:])
        size = [max(side, round(s * scale)) for s in image.shape[1:]]
        # antialiased bilinear weights are positive: only their rounding could leave the range
        scaled = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        image = scaled.clamp(image.min(), image.max())
        top, left = ((s - side) // 2 for s in size)
        return image[:, top : top + side, left : left + side]


def _check_range(name: str, values, low: float, high: float) -> None:
    least, most = float(values.min()), float(values.max())
    if not (low <= least and most <= high):  # NaN fails too
        raise ValueError(f"{name} has values {least:g} ... {most:g}, outside value_range {low:g} ... {high:g}")


def _size(shape) -> str:
    return f"{shape[2]}x{shape[1]} pixels with {shape[0]} channel{'s' if shape[0] > 1 else ''}"
