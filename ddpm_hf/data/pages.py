"""What the readers of image files return and raise."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

EIGHT_BITS = (0.0, 255.0)  # black and white of 8-bit images
MOST_BYTES = 2**28  # of a decoded image: Pillow's limit of 89,478,485 pixels in RGB; small files can decode to far more
MOST_OF_A_FILE = 2**31  # bytes of a file when decompressed, such as a volume of 512x512 pixels in 4,000 slices of int16


class BadImage(Exception):  # noqa: N818 (it is returned as well as raised)
    """The reason why a file can't be used, such as "is empty"."""


class WrongSetting(ValueError):  # noqa: N818
    """The settings do not fit the file. The message continues the name of the file."""


class Picture(NamedTuple):
    """An upright image as it is stored.

    Args:
        colours: (H, W, C), of any type of numbers.
        opacity: (H, W, 1), float32 in [0, 1]; None if the image is opaque.
        nodata: the value that stands for missing ones, as GDAL's tag of a TIFF file says, or None.
        window: the values between which viewers show the image, as a DICOM file says, or None.
        valid: where a TIFF file's mask page says that there is an image, bool (H, W, 1), or None.
    """

    colours: np.ndarray
    opacity: np.ndarray | None = None
    nodata: float | None = None
    window: tuple[float, float] | None = None
    valid: np.ndarray | None = None


class Pages(NamedTuple):
    """The images in a file.

    Args:
        number: how many there are.
        word: what one is called.
        read: the upright image number k, (H, W, C), and whether its last channel is opacity.
        are_bands: whether a number of channels that is `number` means that each is a channel.
        nbytes: of all of them, decoded; 0 if it is not known before.
        nodata, window, valid: see `Picture`.
        axes: the sizes of the axes C (channels), Z and T that the images make, the fastest first, or None.
    """

    number: int
    word: str
    read: Callable[[int], tuple[np.ndarray, bool]]
    are_bands: bool = False
    nbytes: int = 0
    nodata: float | None = None
    window: tuple[float, float] | None = None
    valid: np.ndarray | None = None
    axes: dict[str, int] | None = None


def check_size(size: int, what: tuple[int, ...] | str) -> None:
    """Raise BadImage, before an image (its shape, or words for it) is decoded, if that would take too much memory."""
    if size > MOST_BYTES:
        words = what if isinstance(what, str) else f"{'x'.join(map(str, what))} values"
        raise BadImage(
            f"is too large: {words} are {size:,} bytes when decoded, more than the limit of {MOST_BYTES:,}; cut or "
            "scale it into smaller images"
        )
