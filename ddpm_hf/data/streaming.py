"""Reads, shuffles and decodes the images of a large data set during training."""

import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch
from datasets.distributed import split_dataset_by_node

from ddpm_hf.data.config import DataConfig
from ddpm_hf.data.dataset import (
    BadImages,
    collect,
    decoder_of,
    has_embedded_digits,
    load_images,
    normalized,
    window_of,
    windows,
)
from ddpm_hf.data.missing import split_missing
from ddpm_hf.data.pages import BadImage
from ddpm_hf.data.sources import Item, Rows, source_of
from ddpm_hf.data.workers import decode_each

HELD_OUT_ONE_IN, HELD_OUT_STREAMED = 10, 256
SHUFFLE_BUFFER = 1000
FIRST_BAD = 100  # the fraction of broken images is that of at least so many images


class ImageStream:
    """The counterpart of `ImageData` for streams. Each process reads its own part of the data set.

    The order is that of a shuffle buffer, a function of (seed, epoch, number of processes). A resumed run skips what
    it has seen without decoding it. Without a test split, a hash of the bytes, or of the group, selects a tenth to hold
    out: copies of a file, or the images of a group, are on one side.

    Args:
        process_index, num_processes: the part of the data set to read.
    """

    num_images = None  # unknown
    levels = 256  # values of a pixel, assumed for all streams

    def __init__(self, config: DataConfig, process_index: int, num_processes: int):
        train, test, names = source_of(config, streaming=True)
        self.config, self.rows, self.license, self.no_classes = config, train, train.license, train.no_classes
        self.process_index, self.fingerprint = process_index, "a stream"
        self.decoder, self.workers = decoder_of(config), config.dataloader_num_workers
        self.keeps_aside = not isinstance(test, Rows)
        aside = (item for item in train if self._is_aside(item)) if self.keeps_aside else test
        aside = list(islice(aside, HELD_OUT_STREAMED))
        alone = replace(config, dataloader_num_workers=0)
        self.held_out, _, bad = collect(aside, self.decoder, alone, names, keep=False)
        self.window = window_of(config)
        if self.held_out:
            self.held_out = replace(self.held_out, window=self.window).cropped()
        shuffled = train.dataset.shuffle(seed=config.seed, buffer_size=SHUFFLE_BUFFER)
        self.dataset = split_dataset_by_node(shuffled, process_index, num_processes)
        self.label_names, self.reasons, self.seen = names, dict(bad), 0
        self.position = (0, 0)  # epoch and row of the next image
        self.fill = None  # of the last image, see `ImageData`
        self._keep_state()
        self.images = None
        self.shape = self.held_out.shape if self.held_out else tuple(self.first(1, config.seed).shape[1:])

    @property
    def has_alpha(self) -> bool:
        """Whether the last channel is opacity."""
        return bool(self.decoder.has_alpha)

    def order_classes(self, names: list[str] | None) -> None:
        """Number the classes as in `names` if these are the same names in another order."""
        if self.label_names and names and sorted(names) == sorted(self.label_names):
            self.label_names = self.rows.label_names = list(names)

    def batch_for_step(self, seed: int, step: int, batch_size: int, rows: torch.Tensor, corners=None):
        """The next `len(rows)` images (B, C, H, W) in [-1, 1] and their labels (B,), -1 for no class.

        Missing values are NaN, for `split_missing`. The stream must be at the start of update `step`. `corners` (B, 2)
        are the places of the windows, see `windows`.
        """
        if self.images is None:
            self.images = self._read(*self.position)
        batch = list(islice(self.images, len(rows)))
        self.position = batch[-1][0].position
        labels = torch.tensor([-1 if item.label is None else item.label for item, _ in batch])
        self._keep_state()
        return self._cut(torch.stack([image for _, image in batch]), corners), labels

    def first(self, n: int, seed: int) -> torch.Tensor:
        """The first `n` images (B, C, H, W) in [-1, 1]."""
        images, counted = self._read(0, 0), (self.seen, dict(self.reasons))
        try:
            return split_missing(self._cut(torch.stack([image for _, image in islice(images, n)])), self.fill)[0]
        finally:
            images.close()
            self.seen, self.reasons = counted  # these images are not counted as seen

    def _cut(self, images: torch.Tensor, corners: torch.Tensor | None = None) -> torch.Tensor:
        """The windows of images (B, C, H, W); without `corners`, those in the middle."""
        if not self.window:
            return images
        return windows(images, torch.full((len(images), 2), 0.5) if corners is None else corners, self.window)

    @property
    def bad(self) -> list[tuple[str, str]]:
        """(name, reason) of the images skipped so far."""
        return list(self.reasons.items())

    def state(self) -> dict:
        """The position after the last complete batch, as JSON for `go_to`."""
        return self.kept

    def _keep_state(self) -> None:
        self.kept = {"position": list(self.position), "seen": self.seen, "bad": self.bad}

    def go_to(self, state: dict) -> None:
        """Continue from the position in `state`."""
        self.position, self.seen, self.reasons = tuple(state["position"]), state["seen"], dict(state["bad"])
        self.images = None
        self._keep_state()

    def _is_aside(self, item: Item) -> bool:
        content = item.source if isinstance(item.source, bytes) else str(item.source).encode()
        content = content if item.group is None else item.group.encode()
        return self.keeps_aside and zlib.crc32(content) % HELD_OUT_ONE_IN == 0

    def _read(self, epoch: int, row: int) -> Iterator[tuple[Item, torch.Tensor]]:
        """Yield items, with the position after each, and images (C, H, W) in [-1, 1], for ever."""
        for item, image in decode_each(self._items(epoch, row), self.decoder, self.workers):
            self.seen += 1
            if not isinstance(image, BadImage):
                self.fill = image.fill
                yield item, normalized(torch.from_numpy(image.pixels), image.value_range)
            else:
                self.reasons[item.name] = str(image)
                if len(self.bad) > self.config.max_bad_fraction * max(self.seen, FIRST_BAD):
                    raise BadImages(self.bad, self.seen, self.config.max_bad_fraction)

    def _items(self, epoch: int, row: int) -> Iterator[Item]:
        while True:
            self.dataset.set_epoch(epoch)
            empty = True
            for k, encoded in enumerate(self.dataset):
                empty = False
                if k < row:
                    continue
                item = self.rows.item(k, encoded)
                if not self._is_aside(item):
                    name = f"{item.name} of epoch {epoch}, process {self.process_index}"
                    yield item._replace(name=name, position=(epoch, k + 1))
            if empty:
                raise ValueError(f"{self.rows.source!r} has fewer images than there are processes: use fewer processes")
            epoch, row = epoch + 1, 0


def open_images(config: DataConfig, process_index: int, num_processes: int):
    """The training images, an `ImageData` or `ImageStream`, and the held-out ones, an `ImageData` or None."""
    if not config.streaming or has_embedded_digits(config):
        return load_images(config)
    stream = ImageStream(config, process_index, num_processes)
    return stream, stream.held_out
