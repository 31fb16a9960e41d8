"""Bits per dimension of images under a model: the terms of `bound.py` with seeded noise, all of them or an estimate.

A model is given as `predict(sample, timesteps, labels)`: (B, C, H, W), (B,), (B,) or None -> its output, (B, C, H, W)
or with a learned variance (B, 2 C, H, W).
"""

import numpy as np
import torch

from ddpm_hf.schedulers.bound import bound_terms, prior_term
from ddpm_hf.utils.seeds import seeded_generator

PILOT_TIMESTEPS, PILOT_IMAGES = 48, 32
UNIFORM_SHARE = 0.1  # of the draws of a timestep, so that no weight is larger than ten times that of uniform draws
NOISES = 128  # drawn at a time; another number would draw others


def full_bound(predict, scheduler, images, labels, numbers, seed: int, levels: int, batch_size: int = 64):
    """L_T (N,) and all T terms (N, T), by timestep, of each image, in bits/dim, float64: their sum is its bound.

    Args:
        images: (N, C, H, W) in [-1, 1].
        labels: (N,), or None.
        numbers: N indices; the noise of an image is a function of (`seed`, its number), whatever the other images are.
        levels: values that a pixel can have, evenly spread over [-1, 1].
        batch_size: timesteps that go through the network at once.
    """
    images, T = images.double(), len(scheduler)
    rows = torch.empty(len(images), T, dtype=torch.float64)
    for k, number in enumerate(numbers):
        generator = seeded_generator(seed, "bound", number)
        for t in torch.arange(T).split(NOISES):
            which = torch.full_like(t, k)
            rows[k, t] = _terms(predict, scheduler, images, labels, which, t, generator, levels, batch_size)
    return prior_term(scheduler, images), rows


def timestep_probabilities(predict, scheduler, images, labels, seed: int, levels: int, batch_size: int = 64):
    """How often to draw each timestep so that an estimate of the bound varies least: float64 (T,), 0 at t = 0.

    Proportional to the root of the mean square of the term (Nichol & Dhariwal 2021, arXiv:2102.09672, equation 18),
    measured on the first images and a grid of timesteps; the estimate is unbiased for any probabilities.
    """
    T, images = len(scheduler), images[:PILOT_IMAGES].double()
    if T == 1:
        return torch.zeros(1, dtype=torch.float64)
    grid = np.unique(np.geomspace(1, T - 1, min(PILOT_TIMESTEPS, T - 1)).round().astype(int))
    generator, each, roots = seeded_generator(seed, "pilot", 0), torch.arange(len(images)), []
    for t in grid.tolist():
        t = torch.full_like(each, t)
        terms = _terms(predict, scheduler, images, labels, each, t, generator, levels, batch_size)
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
    the mean of many is that of these N. Other arguments as `full_bound`'s.
    """
    images = images.double()
    if len(scheduler) == 1:
        draws = 0
    found = torch.empty(len(images), dtype=torch.float64)
    for k, number in enumerate(numbers):
        generator = seeded_generator(seed, "estimate", number)
        t = torch.zeros(1, dtype=torch.long)
        if draws:
            t = torch.cat([t, torch.multinomial(probabilities, draws, replacement=True, generator=generator)])
        which = torch.full_like(t, k)
        terms = _terms(predict, scheduler, images, labels, which, t, generator, levels, batch_size)
        found[k] = (torch.where(t == 0, 1.0, 1 / (max(draws, 1) * probabilities[t])) * terms).sum()
    return prior_term(scheduler, images) + found


def _terms(predict, scheduler, images, labels, which, timesteps, generator, levels, batch_size):
    """The terms (n,) of `images[which]` at `timesteps`, both (n,), with noise from `generator`."""
    noise, found = torch.randn((len(which), *images.shape[1:]), generator=generator, dtype=torch.float64), []
    for part in torch.arange(len(which)).split(batch_size):
        x0, t = images[which[part]], timesteps[part]
        sample = scheduler.add_noise(x0, noise[part], t)
        output = predict(sample, t, None if labels is None else labels[which[part]])
        found.append(bound_terms(scheduler, x0, sample, t, output, levels))
    return torch.cat(found)
