"""Features of sets of images, with a cache on disk, and their mean and covariance."""

import functools
import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm.auto import tqdm

from ddpm_hf.data.dataset import ImageData
from ddpm_hf.evaluation.features.extractor import Extractor
from ddpm_hf.utils.checksums import images_sha256
from ddpm_hf.utils.distributed import in_all
from ddpm_hf.utils.files import save_tensors

ROWS = 4096  # of features per block, for the deviations from the mean
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureStats:
    """Mean and covariance of features. The sum a + b has the statistics of both sets together, in full accuracy.

    Args:
        count: the number of rows, N.
        mean: (D,) float64.
        scatter: (D, D) float64, the sum of the outer products of the deviations from the mean.
    """

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "FeatureStats":
        """The statistics of rows (N, D), float64."""
        mean = features.mean(0)
        return cls(len(features), mean, (features - mean).T @ (features - mean))

    def __add__(self, other: "FeatureStats") -> "FeatureStats":
        """The statistics of both sets together (Chan, Golub & LeVeque 1979, equation 2.1)."""
        count, step = self.count + other.count, other.mean - self.mean
        between = torch.outer(step, step) * (self.count * other.count / count)
        return FeatureStats(count, self.mean + step * (other.count / count), self.scatter + other.scatter + between)

    @property
    def covariance(self) -> torch.Tensor:
        """The unbiased covariance (D, D), with the divisor count - 1."""
        return self.scatter / (self.count - 1)

    @functools.cached_property
    def factor(self) -> torch.Tensor:
        """F (D, rank) with F F^T equal to the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        real = values > values.max() * len(values) * torch.finfo(values.dtype).eps  # the others are zero up to rounding
        return vectors[:, real] * values[real].sqrt()


@dataclass
class ImageFeatures:
    """Features (N, D) of a set of images, and logits (N, K) if the extractor classifies; float64."""

    features: torch.Tensor
    logits: torch.Tensor | None = None

    @functools.cached_property
    def stats(self) -> FeatureStats:
        return functools.reduce(lambda a, b: a + b, map(FeatureStats.of, self.features.split(ROWS)))


def measure(extractor: Extractor, batches: Iterable[torch.Tensor]) -> ImageFeatures:
    """Compute the features of all images in batches (B, C, H, W) of floats in [0, 1]."""
    return _joined([extractor(batch) for batch in batches])


def _joined(parts: list[tuple[torch.Tensor, torch.Tensor | None]]) -> ImageFeatures:
    features, logits = zip(*parts, strict=True)
    return ImageFeatures(torch.cat(features), None if logits[0] is None else torch.cat(logits))


def unit_batches(images: ImageData, batch_size: int = 256, indices=None) -> Iterator[torch.Tensor]:
    """All images in order, or those at `indices` (N,), in batches (B, C, H, W) with values in [0, 1]."""
    for part in (torch.arange(len(images)) if indices is None else indices).split(batch_size):
        yield ((images.batch(part) + 1) / 2).clamp(0, 1)


def measure_cached(
    extractor: Extractor,
    images: ImageData,
    folder: str | Path,
    batch_size: int = 256,
    accelerator: Accelerator | None = None,
) -> ImageFeatures:
    """The features of all images, from a cache in `folder` if this extractor has computed them before.

    The name of the file is a hash of the pixels and of the extractor's name, weights and resize. If the file does not
    exist or can't be read, each process of `accelerator` computes the features of a part of the images, and all
    processes get the features of all images. The main process reads and writes the file.
    """
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    identity = (images_sha256(images), extractor.name, extractor.sha256, extractor.resize, extractor.classifies)
    path = Path(folder) / f"features-{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.safetensors"
    found = _read(path) if rank == 0 else None
    if world > 1:
        found = broadcast_object_list([found])[0]
    if found is None:
        shard = torch.arange(len(images)).tensor_split(world)[rank]
        batches = unit_batches(images, batch_size, shard) if len(shard) else ()
        total = -(-len(shard) // batch_size)
        bar = tqdm(batches, "features of reference images", total, leave=False, disable=rank != 0)
        found = _joined(in_all(lambda: [extractor(batch) for batch in bar], accelerator))
        if rank == 0:
            _write(path, found)
    return found


def _read(path: Path) -> ImageFeatures | None:
    try:
        return ImageFeatures(**load_file(path))
    except (OSError, SafetensorError, TypeError):
        return None


def _write(path: Path, measured: ImageFeatures) -> None:
    tensors = {"features": measured.features} | ({} if measured.logits is None else {"logits": measured.logits})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, path)
    except OSError as error:  # the features can be computed again next time
        log.warning(f"{path.parent}: can't write the cache of features: {error}")
