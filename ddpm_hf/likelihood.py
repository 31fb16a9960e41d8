"""How many bits a model needs for an image: the variational bound (Ho et al. 2020, arXiv:2006.11239, equation 5).

-log2 p(x_0) <= L_T + the sum over t = T-1 ... 1 of L_{t-1} + L_0, divided by the number of pixels and channels. A
model is given as `predict(sample, timesteps, labels)`: (B, C, H, W), (B,), (B,) or None -> its output, (B, C, H, W) or
with a learned variance (B, 2 C, H, W).
"""

import math

import numpy as np
import torch

from ddpm_hf.seeds import seeded_generator

BITS = 1 / math.log(2)  # a nat
PILOT_TIMESTEPS, PILOT_IMAGES = 48, 32
UNIFORM_SHARE = 0.1  # of the draws of a timestep, so that no weight is larger than ten times that of uniform draws
NOISES = 128  # drawn at a time; another number would draw others


def bound_terms(scheduler, original_samples, sample, timesteps, model_output, levels: int = 256) -> torch.Tensor:
    """L_{t-1} of each image, L_0 at t = 0, in bits/dim: (B,).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and for t = 0 what the discrete decoder (section 3.3)
    takes for x_0.

    Args:
        original_samples, sample: x_0 and x_t, (B, C, H, W), images in [-1, 1].
        timesteps: (B,).
        model_output: (B, C, H, W), or with a learned variance (B, 2 C, H, W).
        levels: values that a pixel can have, evenly spread over [-1, 1].
    """
    mean, log_variance, _ = scheduler.reverse(model_output, sample, timesteps)
    true_mean, true_log_variance = scheduler.posterior(original_samples, sample, timesteps)
    kl = _gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    decoder = -_log_probability_of_bins(original_samples, mean, (0.5 * log_variance).exp(), 1 / (levels - 1))
    first = (timesteps.to(sample.device) == 0).reshape(-1, *(1,) * (sample.ndim - 1))
    return BITS * torch.where(first, decoder, kl).flatten(1).mean(1)


def prior_term(scheduler, original_samples) -> torch.Tensor:
    """L_T of each image, KL(q(x_T | x_0) || N(0, 1)), in bits/dim: (B,)."""
    last = torch.tensor(len(scheduler) - 1)
    zero = torch.zeros_like(original_samples)
    mean = scheduler.add_noise(original_samples, zero, last)
    std = scheduler.add_noise(zero, zero + 1, last)
    return BITS * _gaussian_kl(mean, 2 * std.log(), zero, zero).flatten(1).mean(1)


def fixed_variance_floor(scheduler, images, levels: int = 256) -> float | None:
    """Bits/dim that a fixed variance costs for these images (N, C, H, W) in [-1, 1] even if the network knows them.

    What the images themselves tell comes on top. Black and white cost less than what lies between, since their bins are
    open, and nothing if the x_0 of the scheduler is not clamped to [-1, 1]. `None` for a learned variance.
    """
    config = scheduler.config
    if config.variance_type == "learned_range":
        return None
    timesteps = torch.arange(len(scheduler))
    beyond = min(config.clip_sample_range, 2.0) if config.clip_sample else 2.0  # the most that x_0 may be guessed to be
    costs = []
    for value, guess in ((0.0, 0.0), (1.0, max(beyond, 1.0))):
        x0 = torch.full((len(scheduler), 1, 1, 1), value, dtype=torch.float64)
        sample, noise = scheduler.add_noise(x0, 0 * x0, timesteps), 0 * x0
        output = scheduler.target(x0, noise, timesteps)
        kl = bound_terms(scheduler, x0, sample, timesteps, output, levels)[1:].sum().item()
        _, log_variance, _ = scheduler.reverse(output[:1], sample[:1], timesteps[:1])
        decoder = _log_probability_of_bins(x0[:1], x0[:1] * 0 + guess, (0.5 * log_variance).exp(), 1 / (levels - 1))
        costs.append(kl - BITS * decoder.item())
    ends = (images.abs() > 1 - 1 / (levels - 1)).double().mean().item()
    return (1 - ends) * costs[0] + ends * costs[1]


def full_bound(predict, scheduler, images, labels, numbers, seed: int, levels: int, batch_size: int = 64):
    """L_T (N,) and all T terms (N, T), by timestep, of each image, in bits/dim, float64: their sum is its bound.

    Args:
        images: (N, C, H, W) in [-1, 1].
        labels: (N,), or None.
        numbers: N; the noise of an image is a function of (`seed`, its number), whichever others are beside it.
    """
    rows, T = [], len(scheduler)
    for k, number in enumerate(numbers):
        generator, terms = seeded_generator(seed, "bound", number), []
        for drawn in torch.arange(T).split(NOISES):
            noise = torch.randn((len(drawn), *images.shape[1:]), generator=generator, dtype=torch.float64)
            for part in torch.arange(len(drawn)).split(batch_size):
                x0 = images[k : k + 1].double().expand(len(part), -1, -1, -1)
                of_image = None if labels is None else labels[k].expand(len(part))
                terms.append(_terms(predict, scheduler, x0, noise[part], drawn[part], of_image, levels))
        rows.append(torch.cat(terms))
    rows = torch.stack(rows) if rows else torch.empty(0, T, dtype=torch.float64)
    return prior_term(scheduler, images.double()), rows


def timestep_probabilities(predict, scheduler, images, labels, seed: int, levels: int, batch_size: int = 64):
    """How often to draw each timestep so that an estimate of the bound varies least: float64 (T,), 0 at t = 0.

    Proportional to the root of the mean square of the term (Nichol & Dhariwal 2021, arXiv:2102.09672, equation 18),
    which is looked at on a few images and a grid of timesteps; the estimate is unbiased for any probabilities.
    """
    T, images = len(scheduler), images[:PILOT_IMAGES].double()
    if T == 1:
        return torch.zeros(1, dtype=torch.float64)
    labels = None if labels is None else labels[:PILOT_IMAGES]
    grid = np.unique(np.geomspace(1, T - 1, min(PILOT_TIMESTEPS, T - 1)).round().astype(int))
    generator, roots = seeded_generator(seed, "pilot", 0), []
    for t in grid.tolist():
        noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        timesteps = torch.full((len(images),), t)
        parts = torch.arange(len(images)).split(batch_size)
        given = [(images[p], noise[p], timesteps[p], None if labels is None else labels[p]) for p in parts]
        terms = torch.cat([_terms(predict, scheduler, *each, levels) for each in given])
        roots.append(terms.square().mean().sqrt().item())
    at = np.log(np.arange(1, T))
    likely = torch.from_numpy(np.exp(np.interp(at, np.log(grid), np.log(np.maximum(roots, 1e-12)))))
    likely = (1 - UNIFORM_SHARE) * likely / likely.sum() + UNIFORM_SHARE / (T - 1)
    return torch.cat([torch.zeros(1, dtype=torch.float64), likely])


def estimated_bound(
    predict, scheduler, images, labels, numbers, probabilities, draws: int, seed: int, levels: int, batch_size: int = 64
):
    """An unbiased estimate of the bound of each image, in bits/dim: float64 (N,).

    L_T + L_0 + the mean of L_{t-1} / p(t) over `draws` timesteps t ~ p = `probabilities` (T,); the standard error of
    the mean of many is that of these N. Arguments as `full_bound`'s.
    """
    if len(scheduler) == 1:
        draws = 0
    found = []
    for k, number in enumerate(numbers):
        generator = seeded_generator(seed, "estimate", number)
        t = torch.zeros(1, dtype=torch.long)
        if draws:
            t = torch.cat([t, torch.multinomial(probabilities, draws, replacement=True, generator=generator)])
        noise = torch.randn((draws + 1, *images.shape[1:]), generator=generator, dtype=torch.float64)
        x0 = images[k : k + 1].double().expand(draws + 1, -1, -1, -1)
        of_image = None if labels is None else labels[k].expand(draws + 1)
        parts = torch.arange(draws + 1).split(batch_size)
        given = [(x0[p], noise[p], t[p], None if labels is None else of_image[p]) for p in parts]
        terms = torch.cat([_terms(predict, scheduler, *each, levels) for each in given])
        found.append((torch.where(t == 0, 1.0, 1 / (max(draws, 1) * probabilities[t])) * terms).sum())
    return prior_term(scheduler, images.double()) + (torch.stack(found) if found else 0.0)


def _terms(predict, scheduler, x0, noise, timesteps, labels, levels):
    sample = scheduler.add_noise(x0, noise, timesteps)
    return bound_terms(scheduler, x0, sample, timesteps, predict(sample, timesteps, labels), levels)


def _gaussian_kl(mean_1, log_variance_1, mean_2, log_variance_2):
    """KL(N(mean_1, variance_1) || N(mean_2, variance_2)) of each element, in nats."""
    ratio = log_variance_1 - log_variance_2
    return 0.5 * (torch.expm1(ratio) - ratio + (mean_1 - mean_2).square() * (-log_variance_2).exp())


def _log_probability_of_bins(x, mean, std, half_bin: float):
    """log P of each element's bin, x -+ `half_bin`, the outer ones open, under N(mean, std), in nats."""
    upper = torch.where(x > 1 - half_bin, math.inf, (x + half_bin - mean) / std)
    lower = torch.where(x < -1 + half_bin, -math.inf, (x - half_bin - mean) / std)
    # Phi(upper) - Phi(lower), on the side of the bell where both are small, so that nothing cancels
    flip = (upper + lower > 0) | upper.isinf()
    flip &= ~lower.isinf()
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    large, small = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return large + torch.log1p(-(small - large).exp())
