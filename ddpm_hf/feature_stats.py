"""What is kept of images as an extractor sees them: statistics of all of them, features of some, on disk if asked."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open

from ddpm_hf.data import ImageData
from ddpm_hf.extractor import Extractor
from ddpm_hf.files import save_tensors, writing

log = logging.getLogger(__name__)


@dataclass
class FeatureStats:
    """Mean and covariance of features that are seen a batch at a time, as exact as of all at once.

    Args:
        count: rows that were seen.
        mean: (D,) float64.
        scatter: (D, D) float64, the sum of the outer products of what deviates from the mean.
    """

    count: int = 0
    mean: torch.Tensor | None = None
    scatter: torch.Tensor | None = None

    @classmethod
    def of(cls, features) -> Self:
        """Of rows (N, D)."""
        features = checked("features", features, least=1)
        mean = features.mean(0)
        return cls(len(features), mean, (features - mean).T @ (features - mean))

    @classmethod
    def of_moments(cls, count: int, mean, covariance) -> Self:
        """From a mean (D,) and a covariance (D, D) with the divisor count - 1, as other tools save them."""
        mean, covariance = (torch.as_tensor(value, dtype=torch.float64) for value in (mean, covariance))
        if count < 2 or mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            shapes = f"count={count}, mean {tuple(mean.shape)}, covariance {tuple(covariance.shape)}"
            raise ValueError(f"{shapes}: must be at least 2, (D,) and (D, D)")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("mean, covariance: must be finite")
        return cls(count, mean, covariance * (count - 1))

    def update(self, features) -> None:
        """See more rows (B, D)."""
        merged = self.merged([self, self.of(features)])
        self.count, self.mean, self.scatter = merged.count, merged.mean, merged.scatter

    @classmethod
    def merged(cls, parts: Iterable["FeatureStats"]) -> Self:
        """Of all that several have seen, batches or processes (Chan, Golub & LeVeque 1979, equation 2.1)."""
        total = cls()
        for part in parts:
            if not part.count:
                continue
            if not total.count:
                total = cls(part.count, part.mean, part.scatter)
                continue
            if part.mean.shape != total.mean.shape:
                raise ValueError(f"features have {len(part.mean)} dimensions, and those before {len(total.mean)}")
            count, step = total.count + part.count, part.mean - total.mean
            between = torch.outer(step, step) * (total.count * part.count / count)
            total = cls(count, total.mean + step * (part.count / count), total.scatter + part.scatter + between)
        return total

    @property
    def covariance(self) -> torch.Tensor:
        """(D, D), unbiased: the divisor is count - 1.

        Raises:
            ValueError: of fewer than two images there is none.
        """
        if self.count < 2:
            raise ValueError(f"statistics of {self.count} images: at least 2 are needed")
        return self.scatter / (self.count - 1)

    def save(self, path: str | Path) -> None:
        """As .npz, with `count`, and `mu` and `sigma` as other tools name them."""
        with writing(path) as beside, open(beside, "wb") as file:
            np.savez(file, count=self.count, mu=self.mean.numpy(), sigma=self.covariance.numpy())

    @classmethod
    def load(cls, path: str | Path, count: int | None = None) -> Self:
        """From .npz with `mu`, `sigma` (or `cov`), and `count`, which others leave out: give it then."""
        try:
            with np.load(path, allow_pickle=False) as file:
                count = int(file["count"]) if "count" in file else count
                found = [file[key] for key in ("mu", "sigma" if "sigma" in file else "cov")]
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: is no .npz with mu and sigma: {error}") from error
        if count is None:
            raise ValueError(f"{path}: does not say of how many images it is: give count")
        return cls.of_moments(count, *found)


@dataclass
class Measured:
    """Images as an extractor sees them: the statistics of all, features (n, D) and logits (n, K) of the first n."""

    stats: FeatureStats
    features: torch.Tensor
    logits: torch.Tensor | None = None

    @classmethod
    def merged(cls, parts: Iterable["Measured"]) -> Self:
        """Of what several processes have measured, one after the other."""
        parts = list(parts)
        logits = None if any(part.logits is None for part in parts) else torch.cat([part.logits for part in parts])
        stats = FeatureStats.merged(part.stats for part in parts)
        return cls(stats, torch.cat([part.features for part in parts]), logits)


def measure(extractor: Extractor, batches: Iterable[torch.Tensor], keep: int | None = None) -> Measured:
    """See images batch by batch.

    Args:
        batches: (B, C, H, W) of floats in [0, 1].
        keep: of how many images to keep features and logits; None: of all.
    """
    stats, kept, logits, n = FeatureStats(), [], [], 0
    for batch in batches:
        features, scores = extractor(batch)
        stats.update(features)
        room = len(features) if keep is None else max(0, keep - n)
        if room:
            kept.append(features[:room])
            logits += [] if scores is None else [scores[:room]]
            n += len(kept[-1])
    if not stats.count:
        raise ValueError("images: must be at least one")
    features = torch.cat(kept) if kept else torch.empty(0, len(stats.mean), dtype=torch.float64)
    return Measured(stats, features, torch.cat(logits) if logits else None)


def unit_batches(images: ImageData, batch_size: int = 256, indices=None) -> Iterator[torch.Tensor]:
    """All images in order, or those of `indices` (N,), (B, C, H, W) in [0, 1]."""
    for part in (torch.arange(len(images)) if indices is None else indices).split(batch_size):
        yield ((images.batch(part) + 1) / 2).clamp(0, 1)


def images_sha256(images: ImageData) -> str:
    """Of their pixels, shape, type and value range."""
    pixels = images.pixels
    digest = hashlib.sha256(f"{tuple(pixels.shape)} {pixels.dtype} {images.value_range}\n".encode())
    for part in pixels.split(1024):
        digest.update(part.contiguous().numpy())
    return digest.hexdigest()


def measure_cached(
    extractor: Extractor,
    images: ImageData,
    folder: str | Path,
    keep: int | None = None,
    batch_size: int = 256,
    accelerator: Accelerator | None = None,
) -> Measured:
    """`measure` of all images, from a file in `folder` where these images met this extractor before.

    The file's name is a hash of the pixels, of the extractor's name, weights and resize, and of `keep`. A file that
    can't be read is made anew, by all processes if there is an `accelerator`: each measures a part, and all have all.
    The main process reads and writes.
    """
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    told = (images_sha256(images), extractor.name, extractor.sha256, extractor.resize, extractor.classifies, keep)
    path = Path(folder) / f"features-{hashlib.sha256(repr(told).encode()).hexdigest()[:32]}.safetensors"
    found = _read(path) if rank == 0 else None
    if world > 1:
        found = broadcast_object_list([found])[0]
    if found is not None:
        return found
    mine = torch.arange(len(images)).tensor_split(world)[rank]

    def measured_here():
        return [measure(extractor, unit_batches(images, batch_size, mine), keep)] if len(mine) else []

    parts = in_all(measured_here, accelerator)
    measured = Measured.merged(parts)
    if keep is not None:  # of each process; of all it is as many
        measured.features = measured.features[:keep]
        measured.logits = None if measured.logits is None else measured.logits[:keep]
    if rank == 0:
        _write(path, measured)
    return measured


def in_all(work: Callable[[], list], accelerator: Accelerator | None) -> list:
    """What `work` gives in each process, one after the other, in all of them.

    Raises:
        RuntimeError: it failed in another process; the error itself where it failed, so that no process waits for ever.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return work()
    try:
        error, found = None, work()
    except Exception as raised:
        error, found = raised, []
    errors = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
    if error is not None:
        raise error
    if any(errors):
        raise RuntimeError(f"another process failed: {next(filter(None, errors))}")
    return gather_object(found)


def _read(path: Path) -> Measured | None:
    try:
        with safe_open(path, "pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        stats = FeatureStats(int(found["count"]), found["mean"], found["scatter"])
        return Measured(stats, found["features"], found.get("logits"))
    except (OSError, SafetensorError, KeyError):
        return None


def _write(path: Path, measured: Measured) -> None:
    stats = measured.stats
    tensors = {"count": torch.tensor(stats.count), "mean": stats.mean, "scatter": stats.scatter}
    tensors |= {"features": measured.features} | ({} if measured.logits is None else {"logits": measured.logits})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({key: value.contiguous() for key, value in tensors.items()}, path)
    except OSError as error:  # the numbers are there, and can be had again
        log.warning(f"{path.parent}: can't keep the statistics of features: {error}")


def checked(name: str, features, least: int = 2) -> torch.Tensor:
    """As float64 (N, D), or a ValueError that says what is wrong."""
    features = torch.as_tensor(features)
    if features.ndim != 2 or not features.shape[1] or not features.is_floating_point():
        raise ValueError(f"{name}: is {tuple(features.shape)} {features.dtype}; it must be (N, D) of floats")
    if len(features) < least:
        raise ValueError(f"{name}: is of {len(features)} images; at least {least} are needed")
    if not features.isfinite().all():
        raise ValueError(f"{name}: has values that are not finite")
    return features.double()
