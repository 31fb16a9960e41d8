"""What turns images into features, and how one is told from another."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Extractor:
    """Features of images, the same on every call: networks are in eval mode.

    Args:
        name: what the features are called in a protocol and in the name of a metric.
        sha256: of the file of weights, or of the tensors where several files hold them, or of the Python source.
        resize: in words, what becomes of images of another size than the network's.
        network: (B, C, H, W) float32 in [0, 1] on `device` -> features (B, D), or (features, logits (B, K)).
        channels: C of the network; None: any. Gray images are repeated for a network of 3.
        classifies: whether there are logits, which the Inception Score needs.
        is_inception_2015: whether a Fréchet distance over these features may be called FID.
    """

    name: str
    sha256: str
    resize: str
    network: Callable
    channels: int | None = None
    classifies: bool = False
    is_inception_2015: bool = False
    device: str | torch.device = "cpu"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images (B, C, H, W) of floats in [0, 1] -> features (B, D) and logits (B, K) or None, float64 on the CPU.

        They are brought to 8 bits first, as an image file holds them: the number is then that of the saved samples.

        Raises:
            ValueError: images of another kind, or a network that does not take them or gives something else.
        """
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"images: must be a tensor (B, C, H, W) of floats in [0, 1], not {kind_of(images)}")
        if not images.numel() or not (images.min() >= 0 and images.max() <= 1):  # NaN fails too
            raise ValueError("images: must be at least one, with values in 0 ... 1")
        images = (images.to(self.device, torch.float32) * 255).round() / 255
        if self.channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if self.channels not in (None, images.shape[1]):
            raise ValueError(
                f"the features {self.name!r} are of {self.channels} channels; images have {images.shape[1]}"
            )
        try:
            found = self.network(images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(f"the features {self.name!r} can't be had of images {kind_of(images)}: {error}") from error
        features, logits = found if isinstance(found, tuple) else (found, None)
        for part in (features, logits) if self.classifies else (features,):
            if not isinstance(part, torch.Tensor) or part.ndim != 2 or len(part) != len(images):
                raise ValueError(
                    f"the features {self.name!r} must be (B, D) of {len(images)} images, not {kind_of(part)}"
                )
        return features.double().cpu(), logits.double().cpu() if self.classifies else None


def kind_of(value) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(network: nn.Module) -> str:
    """Of the names, types, shapes and bytes of its tensors, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
