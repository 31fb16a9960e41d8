"""How an image is brought to a given height and width."""

import numpy as np
import torch
import torch.nn.functional as F


def crop_to_shape(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest part of an image (H, W, C), around its centre, with the ratio of `size` (height, width); a view."""
    (height, width), (to_height, to_width) = pixels.shape[:2], size
    rows, columns = height, width
    if height * to_width >= width * to_height:
        rows = max(1, round(width * to_height / to_width))
    else:
        columns = max(1, round(height * to_width / to_height))
    top, left = (height - rows) // 2, (width - columns) // 2
    return pixels[top : top + rows, left : left + columns]


def scale(image: torch.Tensor, size: tuple[int, int], pad: bool, weights: torch.Tensor | None = None, border=0.0):
    """Scale an image (C, H, W) to `size` (height, width) by antialiased bilinear interpolation.

    Args:
        pad: keep the ratio of the sides and fill up with `border`, the image in the middle; else scale both sides.
        weights: (C, H, W), in [0, 1]: values of weight 0 do not count, as colours under alpha 0. Where none counts,
            the result is `border`.
    """
    height, width = image.shape[1:]
    to = size
    if pad:
        factor = min(size[0] / height, size[1] / width)
        to = tuple(min(most, max(1, round(side * factor))) for side, most in zip((height, width), size))
    if (height, width) != to:
        lowest, highest = image.min(), image.max()
        if weights is None:
            image = _interpolate(image, to)
        else:
            total = _interpolate(weights, to)
            image = torch.where(total > 0, border + _interpolate((image - border) * weights, to) / total, border)
        # the interpolation's weights are positive, so only rounding could leave the range
        image = image.clamp(lowest, highest)
    if to == size:
        return image
    top, left = (size[0] - to[0]) // 2, (size[1] - to[1]) // 2
    return F.pad(image, (left, size[1] - to[1] - left, top, size[0] - to[0] - top), value=border)


def _interpolate(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
