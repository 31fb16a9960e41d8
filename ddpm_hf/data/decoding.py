"""Decodes one image file of any kind to an array without losing bits, channels or opacity.

A broken file gives a `BadImage`, and training skips it. A `ValueError` means that the settings do not fit the file.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ddpm_hf.data.geometry import crop_to_shape, scale
from ddpm_hf.data.missing import hint, is_missing
from ddpm_hf.data.pages import EIGHT_BITS, BadImage
from ddpm_hf.data.reading import read_image
from ddpm_hf.utils.arguments import mode_of

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow


@dataclass
class Decoded:
    """A decoded image.

    Args:
        pixels: (C, H, W), the values in the file: uint8, or float32 for more than 8 bits or if some may be missing,
            which are NaN.
        value_range: the pixel values of black and white.
        deep: whether the image has more than 8 bits.
        fill: what takes the place of missing values, in [-1, 1]; None if none can be missing.
        has_alpha: whether the last channel is opacity.
    """

    pixels: np.ndarray
    value_range: tuple[float, float]
    deep: bool
    fill: float | None = None
    has_alpha: bool = False


@dataclass
class Decoder:
    """Decodes the path or the content of an image file: `decoder(source)` returns a `Decoded` or a `BadImage`.

    Of a file with several images, `decoder(source, k)` decodes number k.

    Args:
        channels: channels of the result; None: as in the image.
        resolution: (height, width) of the results, or the side of a square; None: as in the image.
        resize: how images of another ratio come to that size: "crop" cuts off at two sides what is too much, "pad" adds
            black, or transparent if there is alpha, at the other two, and "squeeze" distorts.
        value_range: the pixel values of black and white, required for more than 8 bits; None: 0 and 255.
        frames, slices: what the frames, pages or slices of a file are, see `read_image`.
        background: blend transparent images with this colour, 0 (black) to 1 (white), one number or one per channel;
            None: opacity becomes a channel.
        nodata: the pixel value that stands for missing ones: a number, "nan", or "tag" for that in GDAL's tag of each
            TIFF file, and for what its mask leaves out; None: no value does.
        nodata_fill: the pixel value that takes their place; None: black.
        clip_values: values outside `value_range` become black or white; else they raise ValueError.
        alpha_channel: whether the last of 2 or 4 channels is opacity; None: as the file says.
        channels_are_inferred: `channels` is that of the first image; losing colour of later ones raises ValueError.
        deep, shape, has_alpha: whether images have more than 8 bits, the shape (C, H, W) of results, and whether their
            last channel is opacity; None: not checked.

    Raises:
        ValueError: the settings do not fit the image; the message continues the name of the file.
    """

    channels: int | None
    resolution: int | tuple[int, int] | None = None
    value_range: tuple[float, float] | None = None
    background: list[float] | None = None
    frames: str | None = None
    slices: int | None = None
    resize: str = "crop"
    nodata: float | str | None = None
    nodata_fill: float | None = None
    clip_values: bool = False
    alpha_channel: bool | None = None
    channels_are_inferred: bool = False
    deep: bool | None = None
    shape: tuple[int, int, int] | None = None
    has_alpha: bool | None = None

    def __call__(self, source: str | Path | bytes | np.ndarray, frame: int | None = None) -> Decoded | BadImage:
        try:
            picture = read_image(source, self.channels, self.frames, frame, self.slices, self.alpha_channel)
            pixels, opacity, tag, window, valid = picture
            deep, missing = pixels.dtype != np.uint8, self._missing(pixels, tag, valid)
            low, high = self._range_of(pixels if missing is None else pixels[~missing], tag, window)
        except BadImage as reason:
            return reason
        if self.size is not None and self.resize == "crop":  # before the conversion to float32, to save memory
            parts = (pixels, opacity, missing)
            pixels, opacity, missing = (None if part is None else crop_to_shape(part, self.size) for part in parts)
        colours = pixels.astype(np.float32)
        if missing is not None:
            colours[missing] = low
        if self.clip_values:
            colours = colours.clip(low, high)
        colours, opacity = self._combine(colours, opacity, low, high)
        has_alpha = opacity is not None
        image = self._to_size(colours, opacity, missing, low, high, deep)
        if self.shape not in (None, image.shape):
            raise ValueError(
                f"is {size_in_words(image.shape)} and the first image is {size_in_words(self.shape)}; give --resolution"
            )
        if self.has_alpha not in (None, has_alpha):
            kinds = ("alpha", "a band") if has_alpha else ("a band", "alpha")
            raise ValueError(
                f"has {kinds[0]} as its last channel and the first image has {kinds[1]} there: --alpha_channel true or "
                "false decides for all"
            )
        fill = None
        if self.nodata is not None:
            fill = -1.0 if self.nodata_fill is None else 2 * (self.nodata_fill - low) / (high - low) - 1
        elif not deep:
            image = image.to(torch.uint8)
        return Decoded(image.contiguous().numpy(), (low, high), deep, fill, has_alpha)

    def hold_to(self, deep: bool, shape: tuple[int, int, int], has_alpha: bool) -> None:
        """Hold all later images to the bit depth, the shape (C, H, W) and the kind of the last channel of the first."""
        self.deep, self.shape, self.has_alpha = deep, shape, has_alpha
        if self.channels is None:
            self.channels, self.channels_are_inferred = shape[0], True

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the results; None: that of the image."""
        return (self.resolution,) * 2 if isinstance(self.resolution, int) else self.resolution

    def _missing(self, pixels: np.ndarray, tag: float | None, valid: np.ndarray | None) -> np.ndarray | None:
        """Where values are missing, bool (H, W, C); None if none can be."""
        if self.nodata is None:
            return None
        value = tag if self.nodata == "tag" else float(self.nodata)
        missing = np.zeros(pixels.shape, bool) if value is None else is_missing(pixels, value)
        if self.nodata == "tag" and valid is not None:
            missing |= ~valid
        if missing.all():
            raise BadImage("has only missing values")
        return missing

    def _range_of(self, pixels: np.ndarray, tag: float | None, window) -> tuple[float, float]:
        """The values of black and white, after checks of those pixels that are not missing."""
        deep, least, most = pixels.dtype != np.uint8, float(pixels.min()), float(pixels.max())
        if self.deep not in (None, deep):
            raise ValueError(
                f"has {'more than' if deep else 'only'} 8 bits and the first image has {'8' if deep else 'more'}: "
                "all images must have the same bit depth; convert those that differ"
            )
        if math.isnan(least):
            raise BadImage(f"has values that are not finite{hint(pixels, tag)}")
        if (math.isinf(least) or math.isinf(most)) and not self.clip_values:  # such as the logarithm of 0
            raise BadImage(
                "has values that are not finite; --value_range BLACK WHITE --clip_values true makes infinite ones "
                "black or white"
            )
        if deep and self.value_range is None:
            shown = ""
            if window:
                black, white = (f"{value:g}" for value in window)
                use = f"--value_range {black} {white} --clip_values true"
                shown = f" (viewers show it between {black} and {white}: {use})"
            raise ValueError(
                f"has more than 8 bits ({pixels.dtype}, values {least:g} ... {most:g}): "
                f"give the values of black and white as --value_range BLACK WHITE{hint(pixels, tag) or shown}"
            )
        low, high = self.value_range if deep else EIGHT_BITS
        is_outside = np.float32(least) < np.float32(low) or np.float32(most) > np.float32(high)  # as they are stored
        if is_outside and not self.clip_values:
            clip = "" if (advice := hint(pixels, tag)) else "; --clip_values true makes them black or white"
            raise ValueError(
                f"has values {least:g} ... {most:g}, outside value_range {low:g} ... {high:g}{advice or clip}"
            )
        return low, high

    def _combine(self, colours: np.ndarray, opacity: np.ndarray | None, low: float, high: float):
        """Make the colours (H, W, C) in low ... high and the opacity (H, W, 1) in 0 ... 1, or None, fit `channels`."""
        has, channels = colours.shape[2], self.channels
        if channels is None:
            channels = has + (opacity is not None and self.background is None)
        has_place = mode_of(channels) in ("LA", "RGBA") and has in (1, 3)  # the last channel is opacity
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
        if has_place and opacity is None:
            opacity = np.ones_like(colours[..., :1])
        return colours, opacity

    def _to_size(self, colours, opacity, missing, low: float, high: float, deep: bool) -> torch.Tensor:
        """Colours (H, W, C) and opacity (H, W, 1) or None -> an image (C, H, W) of `size`, rounded unless `deep`.

        The last channel is straight alpha, if there is opacity: the colour is that of the object, not mixed with a
        background. A colour under alpha 0, which nobody sees, is black and adds nothing to its neighbours. Values where
        `missing` (H, W, any) add nothing to their neighbours either, and those of which more than half is missing are
        NaN.
        """
        parts = [colours] if opacity is None else [colours, low + opacity * (high - low)]
        image, weights, valid = torch.from_numpy(np.concatenate(parts, axis=2)).permute(2, 0, 1), None, None
        if missing is not None:
            if missing.shape[2] != colours.shape[2]:
                missing = missing.any(axis=2, keepdims=True)
            valid = torch.ones_like(image)
            valid[: colours.shape[2]] = torch.from_numpy(~missing).permute(2, 0, 1)
            weights = valid
        if opacity is not None and opacity.min() < 1:
            weights = torch.ones_like(image) if valid is None else valid.clone()
            weights[:-1] *= torch.from_numpy(opacity[..., 0])
        if self.size is not None:
            pad = self.resize == "pad"
            image = scale(image, self.size, pad, weights, border=low)
            valid = None if valid is None else scale(valid, self.size, pad, border=1.0)
        image = image if deep else image.round()
        if opacity is not None:
            image[:-1].masked_fill_(image[-1:] <= low, low)
        return image if valid is None else image.masked_fill_(valid < 0.5, math.nan)


def size_in_words(shape) -> str:
    """(C, H, W) as "28x28 pixels with 1 channel"."""
    return f"{shape[2]}x{shape[1]} pixels with {shape[0]} channel{'s' if shape[0] > 1 else ''}"
