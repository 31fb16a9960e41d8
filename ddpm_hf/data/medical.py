"""Reads DICOM and NIfTI files, with pydicom and nibabel, which are in the extra `ddpm-hf[medical]`.

The header of a DICOM file names a patient. Nothing of it leaves this module but pixels, numbers and a hash.
"""

import hashlib
import importlib.util
import io
import logging
import math
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ddpm_hf.data.archives import open_file
from ddpm_hf.data.pages import MOST_OF_A_FILE, BadImage, Pages, WrongSetting, check_size

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
GZIP_MAGIC, NIFTI_MAGIC = b"\x1f\x8b", (b"n+1\0", b"n+2\0")
HEAD = 540  # bytes of the longer of the two headers of NIfTI


def is_dicom(content: bytes) -> bool:
    return content[128:132] == b"DICM"


def is_dicom_file(path: Path) -> bool:
    """By its suffix or, as many have none or have a UID such as 1.2.840.7 as name, by its first bytes."""
    suffix = path.suffix.lower()
    if suffix and not suffix[1:].isdigit():
        return suffix in DICOM_SUFFIXES
    try:
        with open_file(path) as file:
            return is_dicom(file.read(132))
    except Exception:  # zipfile raises many types
        return False


def is_nifti_file(path: Path) -> bool:
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def is_nifti(content: bytes) -> bool:
    """Whether a file, which may be compressed, is NIfTI, of which the image is in the same file as the header."""
    if content[:2] == GZIP_MAGIC:
        try:
            content = zlib.decompressobj(31).decompress(content, HEAD)
        except zlib.error:
            return False
    return content[344:348] in NIFTI_MAGIC or content[4:8] in NIFTI_MAGIC


def dicom_pages(content: bytes) -> Pages:
    """The frames of a DICOM file, in the units of its rescale slope and intercept, such as Hounsfield units."""
    _needs("pydicom", "DICOM")
    header = _dicom(io.BytesIO(content))
    try:
        number = int(header.get("NumberOfFrames") or 1)
        size = header.Rows * header.Columns * header.get("SamplesPerPixel", 1) * header.BitsAllocated // 8
        window = _window(header)
    except (AttributeError, TypeError, ValueError) as error:
        raise BadImage(f"is a DICOM file without a valid image ({type(error).__name__})") from None
    check_size(size, (header.Rows, header.Columns))
    if not 1 <= number <= len(content):
        raise BadImage(f"is broken: it says that it has {number:,} frames, and it has {len(content):,} bytes")

    def read(k: int) -> tuple[np.ndarray, bool]:
        try:
            return _frame(header, k), False
        except MemoryError:
            raise
        except Exception as error:  # of many types, with texts from the header
            raise _why_not(header, error) from None

    return Pages(number, "frame", read, nbytes=number * size, window=window)


def _why_not(header, error: Exception) -> Exception:
    """What to raise where a frame can't be decoded. The error itself may quote the header."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import HTJ2K, UID, HTJ2KLossless, HTJ2KLosslessRPCL

    syntax = UID(str(header.file_meta.get("TransferSyntaxUID", "")))
    is_known = syntax.type == "Transfer Syntax"
    what = "is a DICOM file" + (f" compressed as {syntax.name}" if is_known and syntax.is_compressed else "")
    if syntax in (HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL) and not get_decoder(syntax).is_available:
        return WrongSetting(f"{what}, which needs another package: pip install pylibjpeg pylibjpeg-openjpeg")
    return BadImage(f"{what} that can't be decoded ({type(error).__name__})")


class Header(NamedTuple):
    """What the header of a DICOM file says of its place among others.

    Args:
        group: a hash of the patient or, without one, of the series; None without both.
        series: a hash of the series, or None.
        position: along the normal of the image, in mm, or None.
        number: of the image in its series.
    """

    group: str | None
    series: str | None
    position: float | None
    number: int
    has_image: bool
    is_localizer: bool


def header_of(path: Path) -> Header | None:
    """The header of a DICOM file; None of another file, or of a damaged one."""
    if not is_dicom_file(path) or importlib.util.find_spec("pydicom") is None:
        return None
    try:
        with open_file(path) as file:
            header = _dicom(file, stop_before_pixels=True)
        series, patient = (str(header.get(name) or "") for name in ("SeriesInstanceUID", "PatientID"))
        return Header(
            _hash(patient or series),
            _hash(series),
            _position(header),
            int(header.get("InstanceNumber") or 0),
            bool(header.get("Rows")),
            "LOCALIZER" in (header.get("ImageType") or ()),
        )
    except Exception:  # of many types; the decoder says what is wrong
        return None


def in_order(files: list[Path], headers: dict[Path, Header]) -> list[Path]:
    """The files with those of a DICOM series in a row, where its first one was, and in the order of their places."""
    series: dict = {}
    for file in files:
        name = headers[file].series if file in headers else None
        series.setdefault(name or file, []).append(file)
    return [file for members in series.values() for file in _by_place(members, headers)]


def _by_place(files: list[Path], headers: dict[Path, Header]) -> list[Path]:
    if len(files) == 1:
        return files
    have_positions = all(headers[file].position is not None for file in files)
    return sorted(files, key=lambda f: (headers[f].position if have_positions else 0, headers[f].number))


def _position(header) -> float | None:
    """Where the image is along its normal, in mm; None if the header does not say."""
    place, turned = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
    if not place or not turned:
        return None
    row, column = np.array(turned, float).reshape(2, 3)
    return float(np.cross(row, column) @ np.array(place, float))


def _hash(name: str) -> str | None:
    return hashlib.sha256(name.encode()).hexdigest() if name else None


def _dicom(file: BinaryIO, **settings):
    import pydicom

    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings quote the header
    try:
        return pydicom.dcmread(file, **settings)
    except Exception as error:  # of many types
        raise BadImage(f"is not a valid DICOM file ({type(error).__name__})") from None


def _frame(header, k: int) -> np.ndarray:
    from pydicom.pixels import apply_color_lut, apply_rescale, pixel_array

    import ddpm_hf.data.dicom_codecs  # noqa: F401 (which registers itself)

    pixels = pixel_array(header, index=k)  # of colours as RGB
    kind = header.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, header)
        pixels = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
    elif kind == "MONOCHROME1":  # its lowest value is white
        pixels = np.array(-1 if header.PixelRepresentation else 2**header.BitsStored - 1, pixels.dtype) - pixels
    if header.BitsAllocated == 1:
        return pixels.astype(bool).reshape(*pixels.shape[:2], -1)
    if pixels.ndim == 2:
        pixels = apply_rescale(pixels, _of_frame(header, k, "PixelValueTransformationSequence"))
    if pixels.dtype == np.float64 and (pixels == pixels.round()).all():
        pixels = pixels.astype(np.int32)
    return pixels.reshape(*pixels.shape[:2], -1)


def _of_frame(header, k: int, sequence: str):
    """What says how the values of frame `k` are meant: an item of `sequence` in files with functional groups."""
    frames, shared = (header.get(f"{name}FunctionalGroupsSequence") or [] for name in ("PerFrame", "Shared"))
    groups = [*frames[k : k + 1], *shared[:1]]
    return next((group[sequence][0] for group in groups if group.get(sequence)), header)


def _window(header) -> tuple[float, float] | None:
    """The values between which a viewer shows the image, or the first such pair of several."""
    header = _of_frame(header, 0, "FrameVOILUTSequence")
    center, width = header.get("WindowCenter"), header.get("WindowWidth")
    if center is None or width is None:
        return None
    center, width = (float(v if isinstance(v, int | float | str) else v[0]) for v in (center, width))
    return center - width / 2, center + width / 2


def nifti_pages(content: bytes, slices: int | None) -> Pages:
    """The upright slices of the volumes in a NIfTI file, along axis 0 axial, 1 coronal, 2 sagittal, or its one image.

    The axes of a volume go from head to foot, from front to back and from left to right. In a time series, the slices
    of a volume come before those of the next one.

    Raises:
        WrongSetting: it has a volume, and `slices` is not one of its axes.
    """
    _needs("nibabel", "NIfTI")
    import nibabel

    if content[:2] == GZIP_MAGIC:
        unzip = zlib.decompressobj(31)
        content = unzip.decompress(content, MOST_OF_A_FILE)
        if unzip.unconsumed_tail:
            raise BadImage(f"is too large: it has more than {MOST_OF_A_FILE:,} bytes when decompressed")
    kind = nibabel.Nifti1Image if content[344:348] in NIFTI_MAGIC else nibabel.Nifti2Image
    image = kind.from_bytes(content)
    if (size := math.prod(image.shape) * image.get_data_dtype().itemsize) > len(content):  # before it is in memory
        raise BadImage(f"is cut off: it says that it has {size:,} bytes of values, and it has {len(content):,} bytes")
    shape = image.shape + (1,) * (4 - len(image.shape))
    if size == 0 or math.prod(shape[4:]) > 1:
        raise BadImage(f"is a NIfTI file of shape {image.shape}; it must be a volume or a time series of volumes")
    orientation = nibabel.io_orientation(image.affine)  # of each axis: which of right, front, head, and its direction
    axes = [int(np.flatnonzero(orientation[:, 0] == k)[0]) for k in (2, 1, 0)]
    upright = tuple(shape[axis] for axis in axes)
    if slices is None and (upright[0] > 1 or shape[3] > 1):
        series = f"is {shape[3]} volumes" if shape[3] > 1 else "is a volume"
        words = "x".join(map(str, upright))
        raise WrongSetting(f"{series} of {words} values: give --slices 0 (axial), 1 (coronal) or 2 (sagittal)")
    slices = slices or 0
    if slices > 2:
        raise WrongSetting(f"is a NIfTI file, and --slices {slices} must be 0 (axial), 1 (coronal) or 2 (sagittal)")
    axis, number = axes[slices], upright[slices]
    is_reversed = (orientation[axis, 1] > 0) == (slices < 2)  # our first two axes end where those of NIfTI begin

    def read(k: int) -> tuple[np.ndarray, bool]:
        volume, place = divmod(k, number)
        place = number - 1 - place if is_reversed else place
        parts = [slice(None)] * 3 + [volume] + [0] * (len(shape) - 4)
        parts[axis] = slice(place, place + 1)
        part = np.asanyarray(image.dataobj[tuple(parts[: len(image.shape)])]).reshape(
            [1 if each == axis else shape[each] for each in range(3)]
        )
        part = nibabel.apply_orientation(part, orientation).transpose(2, 1, 0)[::-1, ::-1]
        return np.ascontiguousarray(part.take(0, axis=slices))[..., None], False

    check_size(size // (number * shape[3]), upright)
    return Pages(number * shape[3], "slice", read)


def _needs(package: str, kind: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise WrongSetting(f"is a {kind} file, which needs {package}: pip install 'ddpm-hf[medical]'")
