"""Conversion between PIL images, arrays and tensors in [0, 1], and tensors in [-1, 1]."""

import numpy as np
import torch
from PIL import Image

from ddpm_hf.utils.arguments import mode_of, require

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class NotFiniteError(ValueError):
    """Samples contain NaN or infinities."""


def mode_for(config) -> str | None:
    """The mode of PIL images of a network with this configuration; None if it has bands, for which there is none."""
    return mode_of(config["in_channels"], config.get("has_alpha"))


def to_unit(name: str, images, config) -> torch.Tensor:
    """`PIL.Image`, a list of them, an array (B, H, W, C) or a tensor (B, C, H, W) -> (B, C, H, W) in [0, 1].

    Arrays and tensors may lack the dimension B. Any other input raises a ValueError about the argument `name`. `config`
    is that of the network.
    """
    channels, mode = config["in_channels"], mode_for(config)
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, list | tuple) and all(isinstance(image, Image.Image) for image in images):
        for image in images:
            if image.mode != mode:
                needs = f"an array or a tensor of {channels} bands" if mode is None else repr(mode)
                raise ValueError(f"{name} has mode {image.mode!r}; this model needs {needs}")
        if len({image.size for image in images}) != 1:
            raise ValueError(f"{name} must be at least one image, and all images must have the same size")
        pixels = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255
        images = pixels.reshape(*pixels.shape[:3], channels)
    given = tuple(getattr(images, "shape", ()))
    wanted = f"(B, H, W, {channels})" if isinstance(images, np.ndarray) else f"(B, {channels}, H, W)"
    if isinstance(images, np.ndarray) and images.ndim > 1 and images.dtype in (np.float16, np.float32, np.float64):
        images = torch.from_numpy(images[None] if images.ndim == 3 else images).movedim(-1, 1)
    if not isinstance(images, torch.Tensor) or not images.is_floating_point() or images.is_meta:
        kind = str(getattr(images, "dtype", type(images).__name__))[:100]
        raise ValueError(f"{name} is {kind}; it must be PIL images, or an array or tensor of floats in [0, 1]")
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[1] != channels or not images.numel():
        raise ValueError(f"{name} has shape {given}; it must have shape {wanted}")
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"{name} has values {images.min():g} ... {images.max():g}; they must be in 0 ... 1")
    return images.to(torch.promote_types(images.dtype, torch.float32))


def to_mask(mask, shape: tuple[int, ...]) -> torch.Tensor:
    """Mask (H, W), (B, H, W), (B, 1, H, W) or `PIL.Image`, for images of `shape` -> bool (B or 1, 1, H, W)."""
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L")) / 255.0
    try:
        mask = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError):  # no numbers, or lists of different lengths
        require("mask", mask, False, "must be an array or a tensor, or a PIL image")
    wanted = [shape[2:], (shape[0], *shape[2:]), (shape[0], 1, *shape[2:])]
    if mask.shape not in [torch.Size(each) for each in wanted]:
        sizes = ", ".join(str(tuple(each)) for each in wanted)
        raise ValueError(f"mask has shape {tuple(mask.shape)}; for these images it must be one of {sizes}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must contain only 0 (known) and 1 (to fill)")
    return mask.bool().reshape(-1, 1, *shape[2:])


def to_output(sample: torch.Tensor, output_type: str):
    """Samples (B, C, H, W), nominally in [-1, 1] -> the `output_type` of `DDPMCustomPipeline`, clamped to [0, 1].

    Raises:
        NotFiniteError: samples contain NaN or infinities, which would become black or white pixels.
    """
    bad = int((~sample.isfinite()).flatten(1).any(dim=1).sum())  # the only synchronisation with the GPU
    if bad:
        raise NotFiniteError(f"the samples are not finite: {bad} of {len(sample)} images hold NaN or infinities")
    return sample if output_type == "latent" else from_unit((sample / 2 + 0.5).clamp(0, 1), output_type)


def from_unit(images: torch.Tensor, output_type: str):
    """(B, C, H, W) in [0, 1] -> "pt": the same; "np": (B, H, W, C) float32; "pil": a list of `PIL.Image`."""
    if output_type == "pt":
        return images
    images = images.float().permute(0, 2, 3, 1).cpu().numpy()
    return images if output_type == "np" else to_pil(images)


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """(B, H, W, C) in [0, 1], C = 1 ... 4 -> a list of PIL images with 8 bits per channel."""
    pixels = (images * 255).round().astype(np.uint8)
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]
