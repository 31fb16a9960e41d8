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

import numpy as np

from ddpm_hf.data.archives import open_file, read_bytes
from ddpm_hf.data.pages import MOST_OF_A_FILE, BadImage, Pages, WrongSetting, check_size

NIFTI_SUFFIXES = (".nii", ".nii.gz")
GZIP_MAGIC, NIFTI_MAGIC = b"\x1f\x8b", (b"n+1\0", b"n+2\0")
HEAD = 540  # bytes of the longer of the two headers of NIfTI


def is_dicom(content: bytes) -> bool:
    return content[128:132] == b"DICM"


def is_dicom_file(path: Path) -> bool:
    """By its suffix .dcm or, as many have no suffix, by its first bytes."""
    if path.suffix:
        return path.suffix.lower() == ".dcm"
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
    header = _dicom(content)
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
            raise BadImage(f"is a DICOM file that can't be decoded ({type(error).__name__})") from None

    return Pages(number, "frame", read, nbytes=number * size, window=window)


def patient_of(path: Path) -> str | None:
    """A hash of the patient or, without one, of the series of a DICOM file: its images stay together in a split."""
    if not is_dicom_file(path) or importlib.util.find_spec("pydicom") is None:
        return None
    try:
        header = _dicom(read_bytes(path), stop_before_pixels=True)
        name = str(header.get("PatientID") or header.get("SeriesInstanceUID") or "")
    except Exception:  # zipfile raises many types; the decoder says what is wrong
        return None
    return hashlib.sha256(name.encode()).hexdigest() if name else None


def _dicom(content: bytes, **settings):
    import pydicom

    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings quote the header
    try:
        return pydicom.dcmread(io.BytesIO(content), **settings)
    except Exception as error:  # of many types
        raise BadImage(f"is not a valid DICOM file ({type(error).__name__})") from None


def _frame(header, k: int) -> np.ndarray:
    from pydicom.pixels import apply_color_lut, apply_rescale, pixel_array

    pixels = pixel_array(header, index=k)  # of colours as RGB
    kind = header.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, header)
        pixels = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
    elif kind == "MONOCHROME1":  # its lowest value is white
        pixels = np.array(-1 if header.PixelRepresentation else 2**header.BitsStored - 1, pixels.dtype) - pixels
    if pixels.ndim == 2:
        pixels = apply_rescale(pixels, header)
    if pixels.dtype == np.float64 and (pixels == pixels.round()).all():
        pixels = pixels.astype(np.int32)
    return pixels.reshape(*pixels.shape[:2], -1)


def _window(header) -> tuple[float, float] | None:
    """The values between which a viewer shows the image, or the first such pair of several."""
    center, width = header.get("WindowCenter"), header.get("WindowWidth")
    if center is None or width is None:
        return None
    center, width = (float(v if isinstance(v, int | float | str) else v[0]) for v in (center, width))
    return center - width / 2, center + width / 2


def nifti_array(content: bytes) -> np.ndarray:
    """The image or volume of a NIfTI file, whose slices are upright: along axis 0 axial, 1 coronal, 2 sagittal.

    The axes go from head to foot, from front to back and from left to right.
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
    shape = image.shape[:3] if all(n == 1 for n in image.shape[3:]) else image.shape
    if len(shape) > 3:
        raise BadImage(f"is a NIfTI file of shape {shape}; it must have up to three dimensions of more than 1")
    image = nibabel.as_closest_canonical(image)  # right, anterior, superior
    volume = np.asanyarray(image.dataobj).reshape(*shape, *(1,) * (3 - len(shape))).transpose(2, 1, 0)[::-1, ::-1]
    return volume[0] if len(volume) == 1 else volume


def _needs(package: str, kind: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise WrongSetting(f"is a {kind} file, which needs {package}: pip install 'ddpm-hf[medical]'")
