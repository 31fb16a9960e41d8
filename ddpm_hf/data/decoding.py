"""Decodes one image file of any kind to an array without losing bits, channels or opacity.

A broken file gives a `BadImage`, and training skips it. A `ValueError` means that the settings do not fit the file.
"""

import errno
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

ARRAY_SUFFIX = ".npy"
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I", "F")  # gray of more than 8 bits
EIGHT_BITS = (0.0, 255.0)  # black and white of 8-bit images
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MOST_BYTES = 2**28  # of a decoded image: Pillow's limit of 89,478,485 pixels in RGB; small files can decode to far more
NOT_OF_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM)  # of machine or network
ORIENTED = {  # EXIF orientation -> the upright array
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


class BadImage(Exception):  # noqa: N818 (it is returned as well as raised)
    """The reason why a file can't be used, such as "is empty"."""


@dataclass
class Decoded:
    """A decoded image.

    Args:
        pixels: (C, H, W), the values in the file: uint8, or float32 for more than 8 bits.
        value_range: the pixel values of black and white.
    """

    pixels: np.ndarray
    value_range: tuple[float, float]


@dataclass
class Decoder:
    """Decodes the path or the content of an image file: `decoder(source)` returns a `Decoded` or a `BadImage`.

    Args:
        channels: channels of the result; None: as in the image.
        resolution: crop the centre square and scale it to this side; None: keep the size.
        value_range: the pixel values of black and white, required for more than 8 bits; None: 0 and 255.
        background: blend transparent images with this colour, 0 (black) to 1 (white), one number or one per channel;
            None: opacity becomes a channel.
        channels_are_inferred: `channels` is that of the first image; losing colour of later ones raises ValueError.
        deep, shape: whether images have more than 8 bits, and the shape (C, H, W) of results; None: not checked.

    Raises:
        ValueError: the settings do not fit the image; the message continues the name of the file.
    """

    channels: int | None
    resolution: int | None = None
    value_range: tuple[float, float] | None = None
    background: list[float] | None = None
    channels_are_inferred: bool = False
    deep: bool | None = None
    shape: tuple[int, int, int] | None = None

    def __call__(self, source: str | Path | bytes | np.ndarray) -> Decoded | BadImage:
        try:
            pixels, opacity = read_image(source, self.channels)
        except BadImage as reason:
            return reason
        deep = pixels.dtype != np.uint8
        if self.deep not in (None, deep):
            raise ValueError(
                f"has {'more than' if deep else 'only'} 8 bits and the first image has {'8' if deep else 'more'}: "
                "all images must have the same bit depth; convert those that differ"
            )
        least, most = float(pixels.min()), float(pixels.max())
        if not (math.isfinite(least) and math.isfinite(most)):
            return BadImage("has values that are not finite")
        if deep and self.value_range is None:
            raise ValueError(
                f"has more than 8 bits ({pixels.dtype}, values {least:g} ... {most:g}): "
                "give the values of black and white as --value_range BLACK WHITE"
            )
        low, high = self.value_range if deep else EIGHT_BITS
        if np.float32(least) < np.float32(low) or np.float32(most) > np.float32(high):  # pixels are stored as float32
            raise ValueError(f"has values {least:g} ... {most:g}, outside value_range {low:g} ... {high:g}")
        image = self._fit(torch.from_numpy(self._combine(pixels.astype(np.float32), opacity, low, high)))
        if self.shape not in (None, image.shape):
            raise ValueError(
                f"is {size_in_words(image.shape)} and the first image is {size_in_words(self.shape)}; give --resolution"
            )
        return Decoded((image if deep else image.round().to(torch.uint8)).contiguous().numpy(), (low, high))

    def _combine(self, colours: np.ndarray, opacity: np.ndarray | None, low: float, high: float) -> np.ndarray:
        """Colours (H, W, C) in low ... high and opacity (H, W, 1) in 0 ... 1 -> (H, W, `channels`)."""
        has, channels = colours.shape[2], self.channels
        if channels is None:
            channels = has + (opacity is not None and self.background is None)
        has_place = channels in (2, 4) and has in (1, 3)  # the last channel is opacity
        wanted = channels - has_place
        if has == 1 and wanted == 3:
            colours = colours.repeat(3, axis=2)
        elif has == 3 and wanted == 1:
            if self.channels_are_inferred:
                raise ValueError("has colour and the first image has none: give --channels 1 or --channels 3")
            colours = colours @ np.float32(LUMINANCE)[:, None]
        elif has != wanted:
            raise ValueError(f"has {has} channels, which can't be converted to channels={channels}")
        if opacity is not None and self.background is not None:
            under = low + np.float32(self.background) * (high - low)
            if len(under) not in (1, wanted):
                raise ValueError(f"has {wanted} colours and background={self.background} has {len(under)}")
            colours, opacity = opacity * colours + (1 - opacity) * under, None
        if opacity is not None and not has_place:
            raise ValueError(
                f"has an alpha channel, which channels={channels} would lose: give --channels {channels + 1}, or "
                "--background with a colour to blend it with, 0 (black) to 1 (white)"
            )
        if not has_place:
            return colours
        opacity = np.ones_like(colours[..., :1]) if opacity is None else opacity
        return np.concatenate([colours, low + opacity * (high - low)], axis=2)

    def _fit(self, image: torch.Tensor) -> torch.Tensor:
        """(H, W, C) -> (C, H, W), the centre square scaled to `resolution`."""
        image, side = image.permute(2, 0, 1), self.resolution
        if side is None:
            return image
        square = min(image.shape[1:])
        top, left = ((s - square) // 2 for s in image.shape[1:])
        image = image[:, top : top + square, left : left + square]
        if square == side:
            return image
        # antialiased bilinear weights are positive, so only rounding could leave the range
        scaled = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]
        return scaled.clamp(image.min(), image.max())


def size_in_words(shape) -> str:
    """(C, H, W) as "28x28 pixels with 1 channel"."""
    return f"{shape[2]}x{shape[1]} pixels with {shape[0]} channel{'s' if shape[0] > 1 else ''}"


def is_image_file(path: Path) -> bool:
    """Whether the suffix is that of an image format that can be read."""
    can_be_read = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN} | {ARRAY_SUFFIX}
    return path.suffix.lower() in can_be_read


def read_image(source: str | Path | bytes | np.ndarray, channels: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Read an upright image: colours (H, W, C), as stored, and opacity (H, W, 1) in [0, 1] or None.

    Args:
        channels: resolves ambiguity: the axis of an array or the pages of a TIFF file that have this length.

    Raises:
        BadImage: the file is broken, empty, too large or of an unknown format.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # about damaged metadata, which is not used
            pixels, has_opacity = _read(source, channels)
    except UnidentifiedImageError:
        head = (source if isinstance(source, bytes) else Path(source).read_bytes())[:16]
        raise BadImage(f"is not in a known image format: it begins with {head!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"is too large: {error}") from error
    except BadImage:
        raise
    except OSError as error:
        if error.errno in NOT_OF_THE_FILE:
            raise
        raise BadImage(f"can't be read: {' '.join(str(error).split())}") from error
    except Exception as error:  # Pillow, tifffile, imagecodecs and NumPy raise many types
        raise BadImage(f"can't be read: {' '.join(str(error).split()) or type(error).__name__}") from error
    if pixels.size == 0:
        raise BadImage(f"is {pixels.shape[1]}x{pixels.shape[0]} pixels")
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype.kind not in "uif":
        raise BadImage(f"contains {pixels.dtype}, not numbers")
    if not has_opacity:
        return pixels, None
    opaque = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "ui" else 1.0
    opacity = pixels[..., -1:].astype(np.float32) / opaque
    if not (opacity.min() >= 0 and opacity.max() <= 1):
        raise BadImage(f"has an opacity of {opacity.min():g} ... {opacity.max():g}, outside [0, 1]")
    return pixels[..., :-1], opacity


def _read(source, channels) -> tuple[np.ndarray, bool]:
    """(H, W, C) and whether the last channel is opacity. Raises errors of many types."""
    if isinstance(source, np.ndarray):
        return _channels_last(source, channels), False
    if isinstance(source, str | Path) and Path(source).suffix.lower() == ARRAY_SUFFIX:
        return _channels_last(_read_array(source), channels), False
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    if not content:
        raise BadImage("is empty")
    if content[:4] in TIFF_MAGIC:
        deep = _read_tiff(content, channels)
        if deep is not None:
            return deep
    image = Image.open(io.BytesIO(content))
    deep_png = image.format == "PNG" and content[24] == 16
    each = 4 if image.mode in DEEP_MODES else 1 + deep_png
    _check_size(image.width * image.height * len(image.getbands()) * each, image.size)
    if image.format == "PNG":
        image.verify()  # checks all checksums; the image must be opened again
        image = Image.open(io.BytesIO(content))
        if deep_png and "transparency" in image.info:
            raise BadImage("has 16 bits and a transparent colour (a tRNS chunk), which is not supported")
        if deep_png and image.mode not in DEEP_MODES:  # Pillow keeps 8 of the 16 bits
            import imagecodecs

            pixels = imagecodecs.png_decode(content)
            return _upright(pixels, image.getexif().get(0x0112)), pixels.shape[2] in (2, 4)
    if 0 in image.size:
        raise BadImage(f"is {image.size[0]}x{image.size[1]} pixels")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in DEEP_MODES:
        return np.asarray(image)[..., None], False
    opacity = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    colours = 1 if image.mode in ("1", "L", "LA", "La") else 3
    pixels = np.asarray(image.convert(MODES[colours + opacity]))
    return pixels.reshape(*pixels.shape[:2], -1), opacity


def _read_array(path) -> np.ndarray:
    """Read a .npy file. An array of objects is a pickle and raises an error."""
    with open(path, "rb") as file:
        head = file.read(16)
    if not head:
        raise BadImage("is empty")
    if not head.startswith(np.lib.format.MAGIC_PREFIX):  # np.load would suggest allow_pickle
        raise BadImage(f"is not a .npy file: it begins with {head!r}")
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a false header allocates nothing
    _check_size(array.nbytes, array.shape)
    return np.array(array)


def _read_tiff(content: bytes, channels) -> tuple[np.ndarray, bool] | None:
    """Read a TIFF file whose bits or bands Pillow would lose. None: Pillow can read it."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page, pages = file.pages[0], len(file.pages)
        samples, extra = page.samplesperpixel, page.extrasamples
        if pages > 1 and samples == 1 and pages == channels:
            _check_size(sum(each.nbytes for each in file.pages), (pages, *page.shape))
            return np.stack([each.asarray() for each in file.pages], axis=-1), False
        alpha = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
        has_opacity = len(extra) == 1 and extra[0] in alpha
        kind = page.photometric.name
        of_colours = {"RGB": 3, "YCBCR": 3, "CIELAB": 3, "SEPARATED": 4}.get(kind, 1)
        interleaved = page.planarconfig == tifffile.PLANARCONFIG.CONTIG or samples == 1
        if page.bitspersample <= 8 and interleaved and samples == of_colours + has_opacity:
            return None
        if kind not in ("MINISBLACK", "RGB"):
            raise BadImage(f"is a TIFF file of {samples} {kind} channels of {page.bitspersample} bits")
        _check_size(page.nbytes, page.shape)
        pixels = page.asarray()
        if page.axes.startswith("S"):
            pixels = np.moveaxis(pixels, 0, -1)
        pixels = pixels.reshape(page.imagelength, page.imagewidth, samples)
        if has_opacity and extra[0] == tifffile.EXTRASAMPLE.ASSOCALPHA:
            raise BadImage("has more than 8 bits and premultiplied alpha, which is not supported")
        tag = page.tags.get("Orientation")
        return _upright(pixels, tag.value if tag else 1), has_opacity


def _upright(pixels: np.ndarray, orientation: int | None) -> np.ndarray:
    return np.ascontiguousarray(ORIENTED[orientation](pixels)) if orientation in ORIENTED else pixels


def _channels_last(array: np.ndarray, channels) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (H, W, C); the channel axis has length `channels` or is the shorter."""
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise BadImage(f"is an array of shape {array.shape}; it must be (H, W), (H, W, C) or (C, H, W)")
    first, last = array.shape[0], array.shape[2]
    is_first = first == channels != last if channels in (first, last) else first < last
    return np.ascontiguousarray(np.moveaxis(array, 0, -1)) if is_first else array


def _check_size(size: int, shape) -> None:
    """Raise BadImage, before an image is decoded, if that would take too much memory."""
    if size > MOST_BYTES:
        raise BadImage(
            f"is too large: {'x'.join(map(str, shape))} values are {size:,} bytes when decoded, more than the limit of "
            f"{MOST_BYTES:,}; cut or scale it into smaller images"
        )
