"""Missing values in images, such as -9999 or NaN beyond the border of a satellite's view.

In decoded pixels they are NaN, which goes through flips and crops with the image. The network sees a fill value in
their place, and the loss leaves them out.
"""

import math

import numpy as np
import torch

GDAL_TAG = "GDAL's nodata tag (42113)"
TYPICAL = (-9999.0, -32768.0, -99999.0, float(np.finfo(np.float32).min))  # of programs for maps and elevation


def is_missing(pixels: np.ndarray, nodata: float) -> np.ndarray:
    """Where pixels of any type have the value `nodata`, which may be NaN; bool, of the shape of the pixels."""
    value = _in_type(nodata, pixels.dtype)
    if value is None:
        return np.zeros(pixels.shape, bool)
    return np.isnan(pixels) if math.isnan(nodata) else pixels == value


def hint(pixels: np.ndarray, tag: float | None) -> str:
    """What to set if the least or greatest of some pixels looks like a missing one, or ""; `tag` is GDAL's value."""
    if pixels.dtype.kind == "f" and np.isnan(pixels).any():
        return "; if NaN stands for missing values, give --nodata nan"
    ends = (pixels.min(), pixels.max())
    if tag is not None and _in_type(tag, pixels.dtype) in ends:
        return f"; {GDAL_TAG} says that {tag:.17g} stands for missing values: give --nodata tag"
    typical = next((value for value in TYPICAL if _in_type(value, pixels.dtype) in ends), None)
    return "" if typical is None else f"; if {typical:.17g} stands for missing values, give --nodata {typical:.17g}"


def _in_type(value: float, dtype: np.dtype):
    """A number in the type of pixels; None if that type has no such number."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return dtype.type(value)
    limits = np.iinfo(dtype)
    is_there = math.isfinite(value) and value == int(value) and limits.min <= value <= limits.max
    return dtype.type(int(value)) if is_there else None


def split_missing(images: torch.Tensor, fill: float | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fill the missing values (NaN) of images, in place.

    Args:
        images: (B, C, H, W) in [-1, 1].
        fill: the value for them, in [-1, 1]; None: no value is missing.

    Returns:
        The images, and where their values are valid, bool (B, C, H, W); None if no value is missing.
    """
    if fill is None:
        return images, None
    valid = images.isnan().logical_not_()
    return images.nan_to_num_(nan=fill), valid
