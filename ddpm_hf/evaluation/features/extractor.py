"""Feature extractors: networks or functions, with what identifies them in the protocol of an evaluation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ddpm_hf.utils.arguments import mode_of

UNDER = 0.5  # the gray under transparent pixels: unlike black and white, rarely the colour of a whole picture


@dataclass(frozen=True)
class Extractor:
    """Computes deterministic features of images.

    Args:
        name: name of the features in the protocol and in the names of metrics.
        sha256: checksum of the weights' file, of the tensors if there are several files, or of the Python source.
        resize: a description of how images are resized to the input size of the network.
        network: (B, C, H, W) float32 in [0, 1] on `device` -> features (B, D), or (features, logits (B, K)).
        channels: C of the network; None: any. For a network with 3 channels, gray is repeated and alpha is blended with
            mid-gray.
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

        Pixels are rounded to 8 bits first, so that samples have the features of their saved images.

        Raises:
            ValueError: the images have values outside [0, 1] or another number of channels than the network, or the
                network raises an error or returns anything but finite features.
        """
        if not (images.min() >= 0 and images.max() <= 1):  # NaN fails too
            raise ValueError("images: the values must lie in 0 ... 1")
        images = (images.to(self.device, torch.float32) * 255).round() / 255
        if self.channels == 3 and mode_of(images.shape[1]) in ("LA", "RGBA"):  # `make_extractor` refuses bands
            colours, opacity = images[:, :-1], images[:, -1:]
            images = opacity * colours + (1 - opacity) * UNDER
        if self.channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if self.channels not in (None, images.shape[1]):
            raise ValueError(
                f"the features {self.name!r} need images with {self.channels} channels, but these have "
                f"{images.shape[1]}"
            )
        try:
            found = self.network(images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"the features {self.name!r} can't be computed for images of shape {tuple(images.shape)}: {error}"
            ) from error
        features, logits = found if isinstance(found, tuple) else (found, None)
        for part in (features, logits) if self.classifies else (features,):
            if not isinstance(part, torch.Tensor) or part.ndim != 2 or len(part) != len(images):
                kind = tuple(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__
                raise ValueError(f"the features {self.name!r} must be a tensor of shape ({len(images)}, D), not {kind}")
            if not part.isfinite().all():
                raise ValueError(f"the features {self.name!r} are not finite")
        return features.cpu().double(), logits.cpu().double() if self.classifies else None
