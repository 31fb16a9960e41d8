"""SHA-256 checksums, in hexadecimal, that identify files, weights and images in evaluations and model cards."""

import hashlib
from pathlib import Path

import torch
from torch import nn


def file_sha256(path: str | Path) -> str:
    """The checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(network: nn.Module) -> str:
    """The checksum of a network's tensors: names, dtypes, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def images_sha256(images) -> str:
    """The checksum of an `ImageData`: its pixels (N, C, H, W), their shape, dtype and value range."""
    pixels = images.pixels
    digest = hashlib.sha256(f"{tuple(pixels.shape)} {pixels.dtype} {images.value_range}\n".encode())
    for part in pixels.split(1024):
        digest.update(part.contiguous().numpy())
    return digest.hexdigest()
