"""Reads the images in a file of any kind as they are stored, without losing bits, channels or opacity.

A broken file gives a `BadImage`, and training skips it. A `ValueError` means that the settings do not fit the file.
"""

import contextlib
import functools
import io
import logging
import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpm_hf.data import medical
from ddpm_hf.data.archives import NOT_OF_THE_FILE, archive_of, open_file, read_bytes, stamp_of
from ddpm_hf.data.exact import DEEP_MODES, bits_of, exact_pages, exact_pixels
from ddpm_hf.data.pages import MOST_OF_A_FILE, BadImage, Pages, Picture, WrongSetting, check_size
from ddpm_hf.utils.arguments import shorten

with contextlib.suppress(ImportError):  # HEIC, from pillow-heif; AVIF is in Pillow itself
    import pillow_heif

    pillow_heif.register_heif_opener()
with contextlib.suppress(ImportError):  # JPEG XL, from pillow-jxl-plugin, which registers itself
    import pillow_jxl  # noqa: F401

for name in ("tifffile", "imagecodecs"):
    logging.getLogger(name).setLevel(
        logging.CRITICAL
    )  # they warn of each file with damaged metadata, which is not used

ARRAY_SUFFIX = ".npy"
OF_MORE_SUFFIXES = (
    ARRAY_SUFFIX,
    ".npz",
    ".lsm",
    ".stk",
    ".btf",
    ".tf2",
    ".tf8",
)  # and of Pillow; all but arrays are TIFF
AXES = {"C": "channels", "Z": "slices", "T": "times"}  # of stacks of ImageJ and OME-TIFF
OME_PIXELS = re.compile(r"<(?:\w+:)?Pixels\b[^>]*>")
ZIP_MAGIC = b"PK\3\4"
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
GDAL_NODATA = 42113  # the TIFF tag
MOST_BANDS = 16  # of an array whose number of channels nobody has given; more may also be the slices of a volume
ORIENTED = {  # EXIF orientation -> the upright array
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def is_image_file(path: Path) -> bool:
    """Whether the suffix is that of an image format that can be read."""
    of_pillow = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return (
        path.suffix.lower() in (*OF_MORE_SUFFIXES, *of_pillow)
        or medical.is_nifti_file(path)
        or medical.is_dicom_file(path)
    )


def count_images(source: str | Path | bytes | None, slices: int | None = None, frames: str | None = None) -> int:
    """The number of images (frames, pages, composites, or slices along axis `slices`) in a file; 1 for a broken one.

    Raises:
        ValueError: an array has no such axis, or a file does not say which pages are a composite.
    """
    if source is None:
        return 1
    try:
        with _explained(source):
            pages = _open(source, None, slices, several=True)
            return (_composites(pages) if frames == "composite" else pages).number
    except BadImage:
        return 1


def read_image(
    source: str | Path | bytes | np.ndarray,
    channels: int | None,
    frames: str | None = None,
    frame: int | None = None,
    slices: int | None = None,
    alpha_channel: bool | None = None,
) -> Picture:
    """Read an upright image.

    Args:
        channels: resolves ambiguity: the axis of an array or the gray pages of a TIFF file that have this length.
        frames: what the frames or pages of a file are: "first" reads the first one, "channels" makes each a channel,
            and "composite" makes the pages that are the channels of one image, as the file says, an image.
        frame: read this one, counted from 0.
        slices: the axis of an array or a NIfTI volume along which each index is an image.
        alpha_channel: whether the last of 2 or 4 channels is opacity; None: as the file says, and not in arrays.

    Raises:
        BadImage: the file is broken, empty, too large or of an unknown format.
        ValueError: the file can be read in several ways and no argument decides.
    """
    with _explained(source):
        pages = _open(source, channels, slices, several=frame is not None)
        if frames == "composite":
            pages = _composites(pages)
        if frame is not None:
            try:
                pixels, has_opacity = pages.read(frame)
            except Exception:
                _kept_open.cache_clear()  # the file may stand in the middle of the broken frame
                raise
        elif pages.number == 1 or frames == "first":
            pixels, has_opacity = pages.read(0)
        elif frames == "channels" or (frames is None and pages.are_bands and pages.number == channels):
            pixels, has_opacity = _as_channels(pages), False
        else:
            sizes = {AXES[axis]: size for axis, size in (pages.axes or {}).items() if size > 1}
            says = (
                f"; the file says that they are {', '.join(f'{n} {name}' for name, n in sizes.items())}"
                if sizes
                else ""
            )
            several = "channels" in sizes and len(sizes) > 1
            composite = f", --frames composite (the {sizes['channels']} channels make one image)" if several else ""
            raise WrongSetting(
                f"has {pages.number} {pages.word}s: give --frames all (each is an image){composite}, --frames channels "
                f"(each is a channel of one image) or --frames first{says}"
            )
    if pixels.size == 0:
        raise BadImage(f"is {pixels.shape[1]}x{pixels.shape[0]} pixels")
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype.kind not in "uif":
        raise BadImage(f"contains {pixels.dtype}, which are no real numbers")
    if alpha_channel is not None and pixels.shape[2] in (2, 4):
        has_opacity = alpha_channel
    if not has_opacity:
        return Picture(pixels, None, pages.nodata, pages.window, pages.valid)
    opaque = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "ui" else 1.0
    opacity = pixels[..., -1:].astype(np.float32) / opaque
    if not (opacity.min() >= 0 and opacity.max() <= 1):
        raise BadImage(f"has an opacity of {opacity.min():g} ... {opacity.max():g}, outside [0, 1]")
    return Picture(pixels[..., :-1], opacity, pages.nodata, pages.window, pages.valid)


@contextlib.contextmanager
def _explained(source) -> Iterator[None]:
    """Raise what goes wrong with a file as `BadImage`, but errors of the settings and of the machine as they are."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # about damaged metadata, which is not used
            yield
    except UnidentifiedImageError:
        with io.BytesIO(source) if isinstance(source, bytes) else open_file(source) as file:
            head = file.read(16)
        raise BadImage(f"is not in a known image format: it begins with {head!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"is too large: {error}") from error
    except (BadImage, WrongSetting):
        raise
    except OSError as error:
        if error.errno in NOT_OF_THE_FILE:
            raise
        raise BadImage(f"can't be read: {shorten(str(error), 300)}") from error
    except Exception as error:  # Pillow, tifffile, imagecodecs and NumPy raise many types
        raise BadImage(f"can't be read: {shorten(str(error), 300) or type(error).__name__}") from error


def _open(source, channels: int | None, slices: int | None, several: bool) -> Pages:
    """The images in a file or an array. `several`: they are read one after the other. Raises errors of many types."""
    if isinstance(source, np.ndarray):
        return _array_pages(source, channels, slices)
    is_array = isinstance(source, str | Path) and Path(source).suffix.lower() == ARRAY_SUFFIX
    if is_array and archive_of(source) is None:
        return _array_pages(_map_array(source), channels, slices)
    if not several:
        return _open_file(source, None, channels, slices)
    return _kept_open(source, None if isinstance(source, bytes) else stamp_of(source), channels, slices)


def _open_file(source: str | Path | bytes, stamp, channels: int | None, slices: int | None) -> Pages:
    """The images in a file. `stamp` differs when the file has changed."""
    content = source if isinstance(source, bytes) else read_bytes(source)
    if not content:
        raise BadImage("is empty")
    if content.startswith((np.lib.format.MAGIC_PREFIX, ZIP_MAGIC)):
        return _array_pages(_array_in(content), channels, slices)
    if medical.is_dicom(content):
        return medical.dicom_pages(content)
    if medical.is_nifti(content):
        return medical.nifti_pages(content, slices)
    if content[:4] in TIFF_MAGIC:
        return _tiff_pages(content)
    return exact_pages(content) or _pillow_pages(content)


# A frame of an animation is made from the frames before it, so the file of the last one stays open
_kept_open = functools.lru_cache(maxsize=1)(_open_file)


def _as_channels(pages: Pages, numbers: Sequence[int] | None = None) -> np.ndarray:
    """The images `numbers` in a file, by default all, as the channels of one, (H, W, number)."""
    numbers = range(pages.number) if numbers is None else numbers
    check_size(pages.nbytes * len(numbers) // pages.number, f"{len(numbers)} {pages.word}s")
    planes = [pages.read(k) for k in numbers]
    first = planes[0][0]
    if any(pixels.shape[2] != 1 for pixels, _ in planes):
        raise WrongSetting(
            f"has {pages.word}s of {max(pixels.shape[2] for pixels, _ in planes)} channels, and --frames channels "
            "makes one channel of each: give --frames all or --frames first"
        )
    if any(pixels.shape != first.shape or pixels.dtype != first.dtype for pixels, _ in planes):
        raise WrongSetting(
            f"has {pages.word}s of several sizes or types, which are no channels of one image: give --frames all or "
            "--frames first"
        )
    return np.concatenate([pixels for pixels, _ in planes], axis=2)


def _composites(pages: Pages) -> Pages:
    """With one image for the pages that are its channels."""
    if pages.number == 1:
        return pages
    if not pages.axes:
        raise WrongSetting(
            f"has {pages.number} {pages.word}s and does not say which are the channels of an image, as ImageJ and "
            "OME-TIFF do: give --frames all (each is an image), channels (each is a channel of one image) or first"
        )
    numbers = np.arange(pages.number).reshape([*pages.axes.values()][::-1])  # the first axis varies fastest
    numbers = np.moveaxis(numbers, 2 - [*pages.axes].index("C"), -1).reshape(-1, pages.axes["C"]).tolist()

    def read(k: int) -> tuple[np.ndarray, bool]:
        return (_as_channels(pages, numbers[k]), False) if pages.axes["C"] > 1 else pages.read(numbers[k][0])

    return pages._replace(number=len(numbers), word="image", read=read, are_bands=False)


# ---------------------------------------------------------------- files of Pillow


def _pillow_pages(content: bytes) -> Pages:
    image = Image.open(io.BytesIO(content))
    _check_pillow(image, content)
    if image.format == "PNG":
        image.verify()  # checks all checksums; the image must be opened again
        image = Image.open(io.BytesIO(content))
    number = _number_of_frames(image)
    if number > len(content):
        raise BadImage(f"is broken: it says that it has {number:,} frames, and it has {len(content):,} bytes")

    def read(k: int) -> tuple[np.ndarray, bool]:
        if number > 1:
            image.seek(k)
        pixels, has_opacity = _pillow_pixels(image, content)
        if number > 1 and has_opacity and pixels[..., -1].min() == 255:  # a frame that covers the one before it
            return pixels[..., :-1], False
        return pixels, has_opacity

    nbytes = number * image.width * image.height * len(image.getbands())
    return Pages(number, "frame", read, nbytes=nbytes)


def _number_of_frames(image: Image.Image) -> int:
    """Of an animation or a series; 1 for a picture with layers, thumbnails or a depth map."""
    if image.format == "PSD" or not getattr(image, "is_animated", False):
        return 1
    if image.format == "MPO" and not all(
        entry["Attribute"]["MPType"].startswith("Multi-Frame") for entry in image.mpinfo[0xB002]
    ):
        return 1  # a camera's or a phone's photo; the other images of the file belong to it
    return image.n_frames


def _check_pillow(image: Image.Image, content: bytes) -> None:
    if (image.format == "FITS" and image.mode != "L") or (image.format == "SGI" and content[3] == 2):
        raise BadImage(f"has more than 8 bits in the format {image.format}, which is not supported: save it as .npy")
    each = 4 if image.mode in DEEP_MODES else 1 + (bits_of(image, content) > 8)
    check_size(image.width * image.height * len(image.getbands()) * each, image.size)


def _pillow_pixels(image: Image.Image, content: bytes) -> tuple[np.ndarray, bool]:
    """The current frame (H, W, C), and whether the last channel is opacity."""
    _check_pillow(image, content)
    pixels = exact_pixels(image, content)
    if pixels is not None:
        orientation = None if image.format == "JXL" else image.getexif().get(0x0112)  # of which libjxl takes care
        return _upright(pixels, orientation), pixels.shape[2] in (2, 4)
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


# ---------------------------------------------------------------- TIFF


def _tiff_pages(content: bytes) -> Pages:
    """The pages of a TIFF file without reduced copies (overviews, thumbnails) and transparency masks."""
    import tifffile

    file = tifffile.TiffFile(io.BytesIO(content), is_ome=False)  # OME metadata may describe pages of other files
    indices = [k for k, page in enumerate(file.pages) if not (page.is_reduced or page.is_mask)] or [0]
    pages = [file.pages[k] for k in indices]
    if len(file.pages) == 1 and file.series[0].size > pages[0].size:  # as ImageJ writes large stacks
        raise BadImage(
            f"has one page that stands for an array of shape {file.series[0].shape}, which is not supported: save it "
            "again with a page for each image"
        )

    def read(k: int) -> tuple[np.ndarray, bool]:
        found = _tiff_pixels(pages[k])
        if found is None:
            image = Image.open(io.BytesIO(content))
            image.seek(indices[k])
            found = _pillow_pixels(image, content)
        return found

    are_gray = all(page.samplesperpixel == 1 for page in pages)
    nbytes = sum(page.nbytes for page in pages)
    nodata, valid = _nodata_of(pages[0].tags.get(GDAL_NODATA)), _valid_of(file, pages)
    return Pages(len(pages), "page", read, are_gray, nbytes, nodata, valid=valid, axes=_axes_of(file, pages))


def _axes_of(file, pages) -> dict[str, int] | None:
    """The sizes of the axes C (channels), Z (slices) and T (times), the fastest first; None if the file has none."""
    if file.is_imagej:
        found = file.imagej_metadata or {}
        sizes = {axis: int(found.get(name, 1)) for axis, name in (("C", "channels"), ("Z", "slices"), ("T", "frames"))}
    else:
        tag = OME_PIXELS.search(pages[0].description)
        found = dict(re.findall(r'(\w+)="(\w+)"', tag[0])) if tag else {}
        order = found.get("DimensionOrder", "").removeprefix("XY")
        if sorted(order) != ["C", "T", "Z"]:
            return None
        sizes = {axis: int(found.get(f"Size{axis}", 0)) for axis in order}
        sizes["C"] //= pages[0].samplesperpixel
    return sizes if math.prod(sizes.values()) == len(pages) > 1 else None


def _valid_of(file, pages) -> np.ndarray | None:
    """The mask, bool (H, W, 1), of a file with one image and one mask of its size, as GDAL writes them; else None."""
    masks = [page for page in file.pages if page.is_mask and not page.is_reduced]
    if len(pages) != 1 or len(masks) != 1 or masks[0].shape != (pages[0].imagelength, pages[0].imagewidth):
        return None
    check_size(math.prod(masks[0].shape), masks[0].shape)
    return masks[0].asarray()[..., None] != 0


def _nodata_of(tag) -> float | None:
    """The number in GDAL's tag, which is text such as "-9999"; None without the tag or if it is no number."""
    try:
        return None if tag is None else float(str(tag.value).strip(" \0"))
    except ValueError:
        return None


def _tiff_pixels(page) -> tuple[np.ndarray, bool] | None:
    """A page (H, W, C), and whether its last channel is opacity; None for what Pillow reads without a loss."""
    import tifffile

    samples, extra, bits, kind = page.samplesperpixel, page.extrasamples, page.bitspersample, page.photometric.name
    alpha = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
    has_opacity = len(extra) == 1 and extra[0] in alpha
    if page.imagedepth > 1:
        raise BadImage(f"has pages that are volumes of {page.imagedepth} planes: save it again with a page for each")
    if page.dtype is None:
        raise BadImage(f"is a TIFF file of {bits} bits of an unknown type")
    of_colours = {"RGB": 3, "YCBCR": 3, "CIELAB": 3, "SEPARATED": 4}.get(kind, 1)
    interleaved = page.planarconfig == tifffile.PLANARCONFIG.CONTIG or samples == 1
    is_plain = kind in ("MINISBLACK", "MINISWHITE", "RGB")
    is_left_to_pillow = not (is_plain and bits >= 8) or page.compression == tifffile.COMPRESSION.JPEG
    is_usual = bits <= 8 and interleaved and samples == of_colours + has_opacity and page.dtype.kind != "i"
    if is_left_to_pillow and is_usual:
        return None
    if not is_plain or (kind == "MINISWHITE" and page.dtype.kind != "u"):
        raise BadImage(
            f"is a TIFF file of {samples} {kind} channel{'s' * (samples > 1)} of the type {page.dtype}, which is not "
            "supported: save it again as gray or RGB"
        )
    check_size(page.nbytes, page.shape)
    pixels = page.asarray()
    if page.axes.startswith("S"):
        pixels = np.moveaxis(pixels, 0, -1)
    pixels = pixels.reshape(page.imagelength, page.imagewidth, samples)
    if kind == "MINISWHITE":
        pixels = np.concatenate([2**bits - 1 - pixels[..., :1], pixels[..., 1:]], axis=2)
    if has_opacity and extra[0] == tifffile.EXTRASAMPLE.ASSOCALPHA:
        pixels = _straight(pixels)
    tag = page.tags.get("Orientation")
    return _upright(pixels, tag.value if tag else 1), has_opacity


def _straight(pixels: np.ndarray) -> np.ndarray:
    """Colours that are multiplied with the opacity, the last channel -> what they were before; as in Pillow."""
    colours, alpha = pixels[..., :-1], pixels[..., -1:]
    if pixels.dtype.kind == "f":
        straight = np.divide(colours, alpha, out=colours.copy(), where=alpha > 0)
    elif pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 4:
        most = np.iinfo(pixels.dtype).max
        straight = colours.astype(np.uint64) * most // np.maximum(alpha, 1)
        straight = np.where(alpha > 0, straight.clip(0, most), colours).astype(pixels.dtype)
    else:
        raise BadImage(f"has premultiplied alpha of the type {pixels.dtype}, which is not supported")
    return np.concatenate([straight, alpha], axis=2)


def _upright(pixels: np.ndarray, orientation: int | None) -> np.ndarray:
    return np.ascontiguousarray(ORIENTED[orientation](pixels)) if orientation in ORIENTED else pixels


# ---------------------------------------------------------------- arrays


def _map_array(path) -> np.ndarray:
    """Map a .npy file into memory, so that a false header allocates nothing. One of objects, a pickle, is an error."""
    with open(path, "rb") as file:
        head = file.read(16)
    if not head:
        raise BadImage("is empty")
    if not head.startswith(np.lib.format.MAGIC_PREFIX):  # np.load would suggest allow_pickle
        raise BadImage(f"is not a .npy file: it begins with {head!r}")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _array_in(content: bytes) -> np.ndarray:
    """The array in the content of a .npy file, or the only one in that of a .npz file."""
    if content.startswith(ZIP_MAGIC):
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            members = file.infolist()
            if len(members) != 1:
                names = ", ".join(Path(member.filename).stem for member in members)
                raise BadImage(f"holds {len(members)} arrays ({shorten(names, 200)}): save each as a .npy file")
            if members[0].file_size > MOST_OF_A_FILE:  # it is never read beyond what it says
                raise BadImage(f"is too large: it says that it has {members[0].file_size:,} bytes when decompressed")
            content = file.read(members[0])
    if not content.startswith(np.lib.format.MAGIC_PREFIX):
        raise BadImage(f"holds a file that is not a .npy file: it begins with {content[:16]!r}")
    return np.load(io.BytesIO(content), allow_pickle=False)


def _array_pages(array: np.ndarray, channels: int | None, slices: int | None) -> Pages:
    """An array is one image, or with `slices` those along this axis of three or four."""
    one_image = slices is None or array.ndim == 2

    def read(k: int) -> tuple[np.ndarray, bool]:
        image = array if one_image else array[(slice(None),) * slices + (k,)]
        check_size(image.nbytes, image.shape)
        return _channels_last(np.array(image), channels, is_slice=not one_image), False

    if not one_image and not slices < array.ndim in (3, 4):
        raise WrongSetting(f"is an array of shape {array.shape}, which has no slices along axis --slices {slices}")
    if not one_image and array.size == 0:
        raise BadImage(f"is an array of shape {array.shape}, without any value")
    return Pages(1 if one_image else array.shape[slices], "slice", read)


def _channels_last(array: np.ndarray, channels: int | None, is_slice: bool) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (H, W, C); the channel axis has length `channels` or is the shorter."""
    if array.ndim == 2:
        return array[..., None]
    hint = (
        ""
        if is_slice or array.ndim < 3
        else "; if each index of an axis is an image of its own, give --slices with this axis"
    )
    if array.ndim != 3:
        raise BadImage(f"is an array of shape {array.shape}; it must be (H, W), (H, W, C) or (C, H, W){hint}")
    first, last = array.shape[0], array.shape[2]
    if channels not in (first, last) and min(first, last) > MOST_BANDS:
        raise WrongSetting(
            f"is an array of shape {array.shape}, a volume or an image of {min(first, last)} channels: give --slices "
            f"with the axis along which each index is an image (0, 1 or 2), or --channels {min(first, last)}"
        )
    is_first = first == channels != last if channels in (first, last) else first < last
    return np.ascontiguousarray(np.moveaxis(array, 0, -1)) if is_first else array
