"""Which images are held out where a data set has no test split, and which images stay together.

Copies and the images of a group (a patient, a video, a volume) are on one side, and each class has its share of the
held-out images. So the held-out loss is that of images of which the network has seen nothing.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
import torch

from ddpm_hf.utils.arguments import show
from ddpm_hf.utils.seeds import seeded_generator

HELD_OUT_FRACTION, HELD_OUT_LIMIT, HELD_OUT_SEED = 0.1, 1024, 0
FOLDER = "folder"


class Groups:
    """Reads the group of an image from its path or its row.

    Args:
        group_by: `"folder"`, the name of a column, or a regular expression whose groups, or whose match if it has none,
            are searched for in the path; None: images have no groups.
    """

    def __init__(self, group_by: str | None):
        self.by = group_by
        try:
            self.pattern = re.compile(group_by or "")
        except re.error as error:
            raise ValueError(f"group_by={show(group_by)} is not a regular expression: {error}") from None

    def of_path(self, name: str, path: str | PurePath | None, columns: Sequence[str] = ()) -> str | None:
        """The group of the image `name`, with `path` in its data set; `columns` are those that it could have named."""
        if self.by is None:
            return None
        path = None if path is None else PurePath(path).as_posix()
        if path is not None and self.by == FOLDER:
            return str(PurePath(path).parent)
        found = path is not None and self.pattern.search(path)
        if not found:
            also = f", nor a column, which are {', '.join(columns)}" if columns else ""
            where = "has no path" if path is None else f"has the path {show(path, 200)}, in which it is not found"
            raise ValueError(f"group_by={show(self.by)}: {name} {where}{also}")
        return " ".join(part or "" for part in found.groups()) or found[0]


NO_GROUPS = Groups(None)


class Traits(NamedTuple):
    """What decides on which side images are: `copies` (N,) uint64, equal for equal pixels, and N `groups` or None."""

    copies: np.ndarray
    groups: list[str | None]


def digest(pixels: np.ndarray, name: str) -> bytes:
    """A hash of 8 bytes of the pixels (C, H, W); of an image of one colour a hash of its `name`.

    Otherwise the blank slices of volumes would tie all volumes together.
    """
    one_colour = np.array_equal(pixels, np.broadcast_to(pixels[:, :1, :1], pixels.shape), pixels.dtype.kind == "f")
    return hashlib.blake2b(name.encode() if one_colour else pixels, digest_size=8).digest()


def random_split(num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted indices of the training images and of a tenth that is held out, whatever the images are."""
    order, aside = _order(num_images), num_held_out(num_images)
    return order[aside:].sort().values, order[:aside].sort().values


def stratified_split(traits: Traits, labels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted indices of the training images and of about a tenth that is held out.

    Copies and groups are on one side. Each class has its share of the held-out images, and at least one if it has
    several images and there are enough for all classes; at least one image of each class is for training. With neither
    classes nor groups nor copies this is `random_split`.

    Args:
        labels: (N,), -1 for no class; None: no classes.
    """
    n = len(traits.copies)
    unit = _units(traits)
    classes = np.zeros(n, np.int64) if labels is None else np.unique(labels.numpy(), return_inverse=True)[1]
    held_out = _choose(unit, classes)
    if not held_out.any() and any(group is not None for group in traits.groups):
        held_out = _choose(unit, np.zeros_like(classes))  # each class is one group
    held_out = torch.from_numpy(held_out)
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def shared(train: Traits, test: Traits) -> tuple[int, int]:
    """How many images of `test` have a copy in `train`, and how many have their group there."""
    groups = {group for group in train.groups if group is not None}
    return int(np.isin(test.copies, train.copies).sum()), sum(group in groups for group in test.groups)


def num_held_out(num_images: int) -> int:
    return min(max(1, round(num_images * HELD_OUT_FRACTION)), HELD_OUT_LIMIT) if num_images > 1 else 0


def _order(num_images: int) -> torch.Tensor:
    return torch.randperm(num_images, generator=seeded_generator(HELD_OUT_SEED, "held out", 0))


def _units(traits: Traits) -> np.ndarray:
    """A number (N,) per image that is equal for images which must stay together."""
    numbers: dict = {}
    own = ((group, k) if group is None else group for k, group in enumerate(traits.groups))
    groups = np.array([numbers.setdefault(group, len(numbers)) for group in own])
    copies = np.unique(traits.copies, return_inverse=True)[1]
    unit, before = np.arange(len(copies)), None
    while before is None or (unit != before).any():
        before = unit
        for key in (copies, groups):
            least = np.full(len(unit), len(unit))
            np.minimum.at(least, key, unit)
            unit = least[key]
    return unit


def _choose(unit: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Whether each image is held out, bool (N,).

    A unit is held out if that brings the classes nearer to what is wanted. Of a class whose units are all too large,
    the smallest is held out, unless that makes more than twice what is wanted in all.
    """
    sizes, order = np.bincount(classes), _order(len(unit)).numpy()
    wanted, held, held_out = _seats(sizes, num_held_out(len(unit))), np.zeros_like(sizes), np.zeros(len(unit), bool)
    by_unit = np.argsort(unit, kind="stable")
    starts = np.searchsorted(unit[by_unit], np.arange(len(unit) + 1))
    lengths = np.diff(starts)

    def take(number: int, needed: bool) -> None:
        members = by_unit[starts[number] : starts[number + 1]]
        counts = np.bincount(classes[members], minlength=len(sizes))
        nearer = np.abs(held + counts - wanted).sum() < np.abs(held - wanted).sum()
        if (nearer or needed) and (held + counts < sizes).all() and not held_out[members[0]]:
            held_out[members] = True
            held[:] += counts

    by_class = np.split(order[np.argsort(classes[order], kind="stable")], np.cumsum(sizes)[:-1])
    for label in np.argsort(sizes, kind="stable"):
        units = unit[by_class[label]]
        units = units[np.sort(np.unique(units, return_index=True)[1])]
        for number in units:
            if held[label] >= wanted[label]:
                break
            if lengths[number] < 2 * np.maximum(wanted - held, 0).sum():  # a larger one brings nothing nearer
                take(number, needed=False)
        for number in units[np.argsort(lengths[units], kind="stable")] if wanted[label] else ():
            if held[label] or (held.any() and held.sum() + lengths[number] > 2 * wanted.sum()):
                break
            take(number, needed=True)
    return held_out


def _seats(sizes: np.ndarray, total: int) -> np.ndarray:
    """How many images to hold out of classes of these sizes, (C,), `total` in all, or fewer if each keeps one image.

    By the method of equal proportions (Huntington and Hill): each class gets one, the largest first, before any gets
    two.
    """
    seats = np.zeros_like(sizes)
    for _ in range(min(total, int((sizes - 1).sum()))):
        priority = sizes / np.sqrt(np.maximum(seats * (seats + 1), 1e-30))
        seats[np.where(seats < sizes - 1, priority, -1).argmax()] += 1
    return seats
