"""Distances between two sets of images over the features of any extractor, with their standard errors.

Features are (N, D) float64 tensors, a row for each image, of at least ten images. No N x N matrix is held in memory:
distances and kernels are computed in blocks of rows.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from ddpm_hf.evaluation.features.stats import FeatureStats

BLOCK = 2**23  # numbers of a block of distances, 64 MiB
GROUPS = 20  # of the jackknife of the Fréchet distance


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error (None if it has none), and the number of images that it was computed from."""

    value: float
    stderr: float | None
    n: int | None


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """Squared 2-Wasserstein distance of the two Gaussians with these moments, in squared units of the features.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500, eq. 6).
    With A = P P^T and B = Q Q^T from eigendecompositions, the trace of (A B)^(1/2) is the sum of the singular values of
    P^T Q: real, not negative, and exact for singular covariances. It is biased upwards by about 1/n (Chong & Forsyth
    2020, arXiv:1911.07023): compare distances of equal numbers of images.
    """
    cross = torch.linalg.svdvals(a.factor.T @ b.factor).sum()
    apart = (a.mean - b.mean).square().sum()
    return max(0.0, float(apart + a.covariance.trace() + b.covariance.trace() - 2 * cross))


def frechet_estimate(features: torch.Tensor, reference: FeatureStats) -> Estimate:
    """`frechet_distance` of features (N, D) to a reference that is taken as exact, with its standard error.

    The standard error is that of the delete-a-group jackknife (Shao & Wu 1989): the features fall into `GROUPS` by
    turns, and the distance is computed without each. A bootstrap would repeat images, which adds to the very bias that
    the distance has; the jackknife does not. The interval does not include the bias of a finite N. If both sets have
    the same distribution the interval is about twice as wide as necessary; if there are fewer images than features it
    is too narrow.
    """
    groups = min(GROUPS, len(features) // 2)
    parts = [FeatureStats.of(features[k::groups]) for k in range(groups)]

    def distance(parts: list[FeatureStats]) -> float:
        return frechet_distance(functools.reduce(lambda a, b: a + b, parts), reference)

    without = [distance(parts[:k] + parts[k + 1 :]) for k in range(groups)]
    return Estimate(distance(parts), math.sqrt((groups - 1) * np.var(without)), len(features))


def kernel_distance(x: torch.Tensor, y: torch.Tensor) -> Estimate:
    """KID of features (M, D) and (N, D): squared maximum mean discrepancy, unbiased, of the kernel (x.y / D + 1)^3.

    Gretton et al. 2012, equation 3, with the kernel of Binkowski et al. 2018 (arXiv:1801.01401, section 4): of all
    pairs, not the mean over random subsets that is often taken, whose expectation is the same. It may be negative. The
    standard error is that of the jackknife of both sets (Arvesen 1969), which leaves out one image at a time; if the
    sets have the same distribution it is too large by a factor of about sqrt(2).
    """
    m, n = len(x), len(y)
    # (M,), (N,): sums over the other images of the set
    xx, yy = (_kernel_sums(z, z)[0] - (z.square().mean(1) + 1) ** 3 for z in (x, y))
    xy, yx = _kernel_sums(x, y)
    sum_xx, sum_yy, sum_xy = xx.sum(), yy.sum(), xy.sum()
    value = sum_xx / (m * (m - 1)) + sum_yy / (n * (n - 1)) - 2 * sum_xy / (m * n)
    variance = 0.0
    for within, between, own, others, other_sum in ((xx, xy, sum_xx, n, sum_yy), (yy, yx, sum_yy, m, sum_xx)):
        k = len(within)
        rest = other_sum / (others * (others - 1))
        without = (own - 2 * within) / ((k - 1) * (k - 2)) + rest - 2 * (sum_xy - between) / ((k - 1) * others)
        variance += (k - 1) * float(without.var(correction=0))
    return Estimate(float(value), math.sqrt(variance), m)


def _kernel_sums(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the other set of the kernel of all pairs: (M,) and (N,)."""
    of_x, of_y = [], x.new_zeros(len(y))
    for rows in _row_blocks(x, y):
        kernel = (rows @ y.T / x.shape[1] + 1) ** 3
        of_x.append(kernel.sum(1))
        of_y += kernel.sum(0)
    return torch.cat(of_x), of_y


def precision_recall_density_coverage(real: torch.Tensor, fake: torch.Tensor, k: int = 5) -> dict[str, Estimate]:
    """Of features of real images (M, D) and of samples (N, D), with balls about each that reach its k-th neighbour.

    precision: the share of samples in a ball of a real image; recall: of real images in a ball of a sample
    (Kynkaanniemi et al. 2019, arXiv:1904.06991, equations 1-2). density: the mean number of balls of real images that a
    sample lies in, over k, which may exceed 1; coverage: the share of real images with a sample in their ball (Naeem et
    al. 2020, arXiv:2002.09797, section 3). The standard errors are those of the mean over the images that are judged,
    with the balls as they are. None says much alone: all-black images can have a precision of 1. All depend on M and
    N: take them equal, and larger than k.
    """
    center = real.mean(0)  # differences of squares lose the fewer digits the nearer to 0 the features lie
    real, fake = real - center, fake - center
    of_real, of_fake = _radii(real, k), _radii(fake, k)  # (M,), (N,), squared
    held, recalled, covered = fake.new_zeros(len(fake)), [], []
    start = 0
    for rows in _row_blocks(real, fake):
        distances = _squared_distances(rows, fake)
        inside = distances <= of_real[start : start + len(rows), None]
        held += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((distances <= of_fake).any(1))
        start += len(rows)
    return {
        "precision": _share(held > 0),
        "recall": _share(torch.cat(recalled)),
        "density": Estimate(float((held / k).mean()), float((held / k).std()) / math.sqrt(len(held)), len(held)),
        "coverage": _share(torch.cat(covered)),
    }


def _radii(x: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance of each row to its k-th nearest other row, (N,)."""
    found, start = [], 0
    for rows in _row_blocks(x, x):
        distances = _squared_distances(rows, x)
        distances.diagonal(start).fill_(math.inf)  # to itself
        found.append(distances.topk(k, 1, largest=False).values[:, -1])
        start += len(rows)
    return torch.cat(found)


def inception_score(logits: torch.Tensor, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL divergence of p(y | x) from p(y), its mean and its standard deviation over the splits.

    Salimans et al. 2016 (arXiv:1606.03498), section 4, which takes 50,000 images in 10 splits. Split k is every
    `splits`-th image from the k-th on, so that images in the order of their classes fall into all. At least 1, at most
    the number of classes; it looks at no real image, and is never shown alone.

    Args:
        logits: (N, K); the Inception's own score is of logits without bias.
    """
    scores = []
    for k in range(splits):
        log_p = logits[k::splits].log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


def _row_blocks(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x in parts whose pairs with all of y fit a block."""
    return x.split(max(1, BLOCK // len(y)))


def _squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(M, D), (N, D) -> (M, N)"""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = torch.addmm(squares, x, y.T, alpha=-2)
    # Copies are at 0: what a float32 network and a difference of squares leave of it is less than this.
    return distances.masked_fill_(distances <= 1e-12 * squares, 0)


def _share(values: torch.Tensor) -> Estimate:
    """Of True, with the standard error of Agresti & Coull 1998, which is not 0 where all are alike."""
    n = len(values)
    p = (float(values.sum()) + 2) / (n + 4)
    return Estimate(float(values.double().mean()), math.sqrt(p * (1 - p) / (n + 4)), n)
