"""The metrics over features: Fréchet distance, kernel distance, precision, recall, density, coverage, Inception Score.

Features are float64 tensors (N, D), one row per image, of at least ten images. Distances and kernels are computed in
blocks of rows, so that no N x N matrix is in memory.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch

from ddpm_hf.evaluation.context import SPLITS, Context, evenly_spread
from ddpm_hf.evaluation.features.stats import FeatureStats, ImageFeatures
from ddpm_hf.evaluation.registry import Estimate, Findings, metric, record

BLOCK = 2**23  # numbers in a block of distances, 64 MiB
GROUPS = 20  # groups of the jackknife of the Fréchet distance
NEIGHBOURS = 5  # k of precision, recall, density and coverage


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
    """`frechet_distance` of features (N, D) to a reference without error of its own, with its standard error.

    The standard error is that of the delete-a-group jackknife (Shao & Wu 1989): row i belongs to group i mod `GROUPS`,
    and the distance is computed without each group. Unlike a bootstrap, the jackknife repeats no images, which would
    increase the bias. The interval does not include the bias of a finite N. It is about twice as wide as necessary if
    both sets have the same distribution, and too narrow if there are fewer images than features.
    """
    groups = min(GROUPS, len(features) // 2)
    parts = [FeatureStats.of(features[k::groups]) for k in range(groups)]

    def distance(parts: list[FeatureStats]) -> float:
        return frechet_distance(functools.reduce(lambda a, b: a + b, parts), reference)

    without = [distance(parts[:k] + parts[k + 1 :]) for k in range(groups)]
    return Estimate(distance(parts), math.sqrt((groups - 1) * np.var(without)), len(features))


@metric("fd", "samples", "features")
def frechet(context: Context) -> Findings:
    """The Fréchet distance, which is called FID only for the features of the Inception of 2015."""
    inception = context.extractor.is_inception_2015
    key, name = ("fid", "FID") if inception else ("fd", f"Fréchet distance ({context.extractor.name} features)")
    return _distances(context, key, name, lambda features, reference: frechet_estimate(features, reference.stats), True)


def kernel_distance(x: torch.Tensor, y: torch.Tensor) -> Estimate:
    """KID of features (M, D) and (N, D): squared maximum mean discrepancy, unbiased, of the kernel (x.y / D + 1)^3.

    Gretton et al. 2012, equation 3, with the kernel of Binkowski et al. 2018 (arXiv:1801.01401, section 4). It uses all
    pairs; the usual mean over random subsets has the same expectation. It may be negative. The standard error is that
    of the two-sample jackknife (Arvesen 1969), which leaves out one image at a time. It is too large by a factor of
    about sqrt(2) if the sets have the same distribution.
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
    """The kernel of all pairs, summed over y, (M,), and over x, (N,)."""
    x_sums, y_sums = [], x.new_zeros(len(y))
    for rows in _row_blocks(x, y):
        kernel = (rows @ y.T / x.shape[1] + 1) ** 3
        x_sums.append(kernel.sum(1))
        y_sums += kernel.sum(0)
    return torch.cat(x_sums), y_sums


@metric("kid", "samples", "features")
def kernel(context: Context) -> Findings:
    """The kernel distance, whose expectation does not depend on the number of images."""
    name = f"Kernel distance, KID ({context.extractor.name} features)"
    return _distances(context, "kid", name, lambda features, of: kernel_distance(features, of.features), False)


def _distances(
    context: Context, key: str, name: str, distance: Callable[[torch.Tensor, ImageFeatures], Estimate], biased: bool
) -> Findings:
    """Distances of samples to training and held-out images, and of held-out to training images.

    Args:
        distance: features (N, D) and a reference -> their distance.
        biased: whether fewer images have a larger distance. If so, and if there are fewer held-out images than samples,
            the result includes the distance of an equal number of samples.
    """
    samples, real, train = context.samples.features, context.held_out_features(), context.references["train"]
    compared = {
        split: (f"to the {SPLITS[split]} images", samples, reference) for split, reference in context.references.items()
    }
    if real is not None and biased and len(real) < len(samples):
        words = "to the training images, of as many samples as held-out images"
        compared["train_matched"] = words, samples[: len(real)], train
    if real is not None:
        compared["real"] = "of held-out to training images", real, train
    return Findings({
        f"{key}_{of}": record(f"{name} {words}", distance(images, reference), n_reference=len(reference.features))
        for of, (words, images, reference) in compared.items()
    })  # fmt: skip


def precision_recall_density_coverage(real: torch.Tensor, fake: torch.Tensor, k: int = 5) -> dict[str, Estimate]:
    """Compare features of real images (M, D) and of samples (N, D) by balls that reach the k-th neighbour in each set.

    Precision is the share of samples in the ball of a real image, recall the share of real images in the ball of a
    sample (Kynkaanniemi et al. 2019, arXiv:1904.06991, equations 1-2). Density is the mean number of balls of real
    images that contain a sample, divided by k; it may exceed 1. Coverage is the share of real images with a sample in
    their ball (Naeem et al. 2020, arXiv:2002.09797, section 3). The standard errors are those of means over the
    images, with fixed balls. Report all four: all-black images can have a precision of 1. All depend on M and N, which
    should be equal and larger than k.
    """
    center = real.mean(0)  # differences of squares lose fewer digits near 0
    real, fake = real - center, fake - center
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)  # (M,), (N,), squared
    held, recalled, covered = fake.new_zeros(len(fake)), [], []
    start = 0
    for rows in _row_blocks(real, fake):
        distances = _squared_distances(rows, fake)
        inside = distances <= real_radii[start : start + len(rows), None]
        held += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((distances <= fake_radii).any(1))
        start += len(rows)
    return {
        "precision": _share(held > 0),
        "recall": _share(torch.cat(recalled)),
        "density": Estimate(float((held / k).mean()), float((held / k).std()) / math.sqrt(len(held)), len(held)),
        "coverage": _share(torch.cat(covered)),
    }


def _radii(x: torch.Tensor, k: int) -> torch.Tensor:
    """The squared distance of each row to its k-th nearest other row, (N,)."""
    found, start = [], 0
    for rows in _row_blocks(x, x):
        distances = _squared_distances(rows, x)
        distances.diagonal(start).fill_(math.inf)  # to itself
        found.append(distances.topk(k, 1, largest=False).values[:, -1])
        start += len(rows)
    return torch.cat(found)


@metric("prdc", "samples", "features")
def neighbourhoods(context: Context) -> Findings:
    """Precision, recall, density and coverage."""
    samples, rows = context.samples.features, {}
    for split, of in context.references.items():
        n = min(len(samples), len(of.features))
        values = precision_recall_density_coverage(evenly_spread(of.features, n), samples[:n], NEIGHBOURS)
        for name, value in values.items():
            rows[f"{name}_{split}"] = record(f"{name.capitalize()}, {SPLITS[split]} images", value)
    return Findings(rows, {"k": NEIGHBOURS, "images": "as many of each as there are of the fewer"})


def inception_score(logits: torch.Tensor, splits: int = 10) -> tuple[float, float]:
    """exp(E KL(p(y | x) || p(y))): its mean and standard deviation over the splits.

    Salimans et al. 2016 (arXiv:1606.03498), section 4, with 50,000 images in 10 splits. Split k has every `splits`-th
    image from image k on, so that sorted classes fall into all splits. The score lies between 1 and the number of
    classes, and does not depend on real images.

    Args:
        logits: (N, K); without their bias for the Inception of 2015.
    """
    scores = []
    for k in range(splits):
        log_p = logits[k::splits].log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


@metric("is", "samples", "features", "logits")
def inception(context: Context) -> Findings:
    """The Inception Score."""
    of, samples = context.extractor, context.samples.logits
    name = "Inception Score" + ("" if of.is_inception_2015 else f" ({of.name} classifier)")
    scored = {"inception_score": (name, samples)}
    if context.has_held_out:
        real = evenly_spread(context.references["held_out"].logits, context.num_samples)
        if len(real) < len(samples):
            words = f"{name}, of as many samples as held-out images"
            scored["inception_score_matched"] = words, samples[: len(real)]
        scored["inception_score_real"] = f"{name} of held-out images", real
    rows = {}
    for key, (words, logits) in scored.items():
        splits = max(2, min(10, len(logits) // 50))
        value, spread = inception_score(logits, splits)
        rows[key] = record(words, Estimate(value, spread / math.sqrt(splits - 1), len(logits)), splits=splits)
    return Findings(rows)


def _row_blocks(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split x so that the distances of each part to all of y fit a block."""
    return x.split(max(1, BLOCK // len(y)))


def _squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(M, D), (N, D) -> (M, N)"""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = torch.addmm(squares, x, y.T, alpha=-2)
    # Copies have distance 0: rounding by a float32 network and the difference of squares is smaller than this.
    return distances.masked_fill_(distances <= 1e-12 * squares, 0)


def _share(values: torch.Tensor) -> Estimate:
    """The share of True, with the standard error of Agresti & Coull 1998, which is never 0."""
    n = len(values)
    p = (float(values.sum()) + 2) / (n + 4)
    return Estimate(float(values.double().mean()), math.sqrt(p * (1 - p) / (n + 4)), n)
