"""Distances between sets of images, over the features of any extractor, with their errors. All in float64.

Features are (N, D), one row an image, as tensors or arrays. Nothing of N x N numbers is held: distances and kernels are
computed in blocks of rows.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from ddpm_hf.feature_stats import FeatureStats, checked

BLOCK = 2**23  # numbers of a block of distances, 64 MiB


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error, and of how many images it is."""

    value: float
    stderr: float
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, as of a normal distribution."""
        return self.value - 1.96 * self.stderr, self.value + 1.96 * self.stderr

    def __str__(self):
        return f"{self.value:.4g} ± {1.96 * self.stderr:.2g}"


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """Squared 2-Wasserstein distance of the two Gaussians with these moments, of the features' unit squared.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500, eq. 6).
    With A = P P^T and B = Q Q^T from eigendecompositions, the trace of (A B)^(1/2) is the sum of the singular values of
    P^T Q: real, not negative, and exact for singular covariances. It is biased upwards by about 1/n (Chong & Forsyth
    2020, arXiv:1911.07023): compare distances of equal numbers of images.
    """
    return _frechet(a, b, _factor(b.covariance))


def _frechet(a: FeatureStats, b: FeatureStats, factor_b: torch.Tensor) -> float:
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features have {len(a.mean)} and {len(b.mean)} dimensions: one extractor makes both")
    cross = torch.linalg.svdvals(_factor(a.covariance).T @ factor_b).sum()
    apart = (a.mean - b.mean).square().sum()
    return max(0.0, float(apart + a.covariance.trace() + b.covariance.trace() - 2 * cross))


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """(D, D) -> (D, rank) whose product with its transpose is the covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    real = values > values.max() * len(values) * torch.finfo(values.dtype).eps  # the others are rounding of zero
    return vectors[:, real] * values[real].sqrt()


def frechet_estimate(features, reference: FeatureStats, groups: int = 20) -> Estimate:
    """`frechet_distance` of features (N, D) to a reference that is taken as it is, with its standard error.

    Of the delete-a-group jackknife (Shao & Wu 1989): the features fall into `groups` by turns, and the distance is
    taken without each. A bootstrap would repeat images, which adds to the very bias that the distance has; the
    jackknife leaves it alone. The bias of a finite N is no part of the interval. Where both sets are of one
    distribution the interval is about twice as wide as need be, and with fewer images than features too narrow.
    """
    features = checked("features", features, least=2)
    groups = min(groups, len(features) // 2)
    if groups < 2:
        raise ValueError(f"features: {len(features)} images are too few for an interval; at least 4 are needed")
    parts = [FeatureStats.of(features[k::groups]) for k in range(groups)]
    factor = _factor(reference.covariance)
    value = _frechet(FeatureStats.merged(parts), reference, factor)
    without = [_frechet(FeatureStats.merged(parts[:k] + parts[k + 1 :]), reference, factor) for k in range(groups)]
    return Estimate(value, math.sqrt((groups - 1) * np.var(without)), len(features))


def kernel_distance(x, y) -> Estimate:
    """KID of features (M, D) and (N, D): squared maximum mean discrepancy, unbiased, of the kernel (x.y / D + 1)^3.

    Gretton et al. 2012, equation 3, with the kernel of Binkowski et al. 2018 (arXiv:1801.01401, section 4): of all
    pairs, not the mean over random subsets that is often taken, whose expectation is the same. It may be negative. The
    standard error is of the jackknife of both sets (Arvesen 1969), which leaves out an image at a time; where the sets
    are of one distribution it errs on the safe side, by a factor of about sqrt(2).
    """
    x, y = _pair("x", x, "y", y)
    m, n = len(x), len(y)
    xx, yy = (_kernel_sums(z, z)[0] - _kernel(z, z) for z in (x, y))  # (M,), (N,): over the other images of the set
    xy, yx = _kernel_sums(x, y)
    sum_xx, sum_yy, sum_xy = xx.sum(), yy.sum(), xy.sum()
    value = sum_xx / (m * (m - 1)) + sum_yy / (n * (n - 1)) - 2 * sum_xy / (m * n)
    variance = 0.0
    for within, between, own, others, other_sum in ((xx, xy, sum_xx, n, sum_yy), (yy, yx, sum_yy, m, sum_xx)):
        k = len(within)
        if k < 3:
            return Estimate(float(value), math.inf, m)
        rest = other_sum / (others * (others - 1))
        without = (own - 2 * within) / ((k - 1) * (k - 2)) + rest - 2 * (sum_xy - between) / ((k - 1) * others)
        variance += (k - 1) * float(without.var(correction=0))
    return Estimate(float(value), math.sqrt(variance), m)


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of each pair of rows, (N,)."""
    return ((x * y).sum(1) / x.shape[1] + 1) ** 3


def _kernel_sums(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the other set of the kernel of all pairs: (M,) and (N,)."""
    of_x, of_y = [], x.new_zeros(len(y))
    for rows in _row_blocks(x, y):
        kernel = (rows @ y.T / x.shape[1] + 1) ** 3
        of_x.append(kernel.sum(1))
        of_y += kernel.sum(0)
    return torch.cat(of_x), of_y


def precision_recall_density_coverage(real, fake, k: int = 5) -> dict[str, Estimate]:
    """Of features of real (M, D) and made images (N, D), with balls about each image that reach its k-th neighbour.

    precision: the share of made images in a ball of a real one; recall: of real images in a ball of a made one
    (Kynkaanniemi et al. 2019, arXiv:1904.06991, equations 1-2). density: how many balls of real images a made one lies
    in, over k, which may exceed 1; coverage: the share of real images with a made one in their ball (Naeem et al. 2020,
    arXiv:2002.09797, section 3). The standard errors are of the mean over the images that are judged, with the balls as
    they are. None says much alone: all-black images can have a precision of 1. All depend on M and N: take them equal.
    """
    real, fake = _pair("real", real, "fake", fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k={k}: must be at least 1 and less than the images, {len(real)} real and {len(fake)} made")
    center = real.mean(0)  # differences of squares lose the less the nearer to 0 the features lie
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
    shares = {"precision": held > 0, "recall": torch.cat(recalled), "coverage": torch.cat(covered)}
    found = {name: _share(values) for name, values in shares.items()}
    return {name: found[name] if name in found else _mean((held / k).double())
            for name in ("precision", "recall", "density", "coverage")}  # fmt: skip


def _radii(x: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance of each row to its k-th nearest other row, (N,)."""
    found, start = [], 0
    for rows in _row_blocks(x, x):
        distances = _squared_distances(rows, x)
        own = torch.arange(len(rows), device=x.device)
        distances[own, start + own] = math.inf
        found.append(distances.topk(k, 1, largest=False).values[:, -1])
        start += len(rows)
    return torch.cat(found)


def inception_score(logits, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL divergence of p(y | x) from p(y), its mean and its standard deviation over the splits.

    Salimans et al. 2016 (arXiv:1606.03498), section 4, which takes 50,000 images in 10 splits. Split k is every
    `splits`-th image from the k-th on, so that images in the order of their classes fall into all. At least 1, at most
    the number of classes; it looks at no real image, and is never shown alone.

    Args:
        logits: (N, K); the Inception's own score is of logits without bias.
    """
    logits = checked("logits", logits, least=2)
    if not 2 <= splits <= len(logits) // 2:
        raise ValueError(f"splits={splits}: must be at least 2 and at most half of the {len(logits)} images")
    scores = []
    for k in range(splits):
        log_p = logits[k::splits].log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


def nearest_neighbours(queries, references, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The k references (N, D) nearest to each query (M, D): indices and Euclidean distances, (M, k), nearest first."""
    queries, references = checked("queries", queries, least=1), checked("references", references, least=1)
    _same_width("queries", queries, "references", references)
    if not 1 <= k <= len(references):
        raise ValueError(f"k={k}: must be at least 1 and at most the {len(references)} references")
    center = references.mean(0)  # differences of squares lose the less the nearer to 0 the features lie
    queries, references = queries - center, references - center
    blocks = _row_blocks(queries, references)
    indices = torch.cat([_squared_distances(rows, references).topk(k, 1, largest=False).indices for rows in blocks])
    # Anew from the differences: an exact copy is at distance 0, not at the rounding of a difference of squares.
    distances = torch.stack([(queries - references[column]).norm(dim=1) for column in indices.T], 1)
    distances, order = distances.sort(dim=1, stable=True)
    return indices.gather(1, order), distances


# ---------------------------------------------------------------- blocks and checks


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


def _mean(values: torch.Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values)), len(values))


def _pair(name_x: str, x, name_y: str, y) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = checked(name_x, x), checked(name_y, y)
    _same_width(name_x, x, name_y, y)
    return x, y


def _same_width(name_x: str, x: torch.Tensor, name_y: str, y: torch.Tensor) -> None:
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{name_x}, {name_y}: have {x.shape[1]} and {y.shape[1]} dimensions; one extractor makes both")
