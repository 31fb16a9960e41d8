"""The metric `bpd`: bits per dimension of images, from the terms of `schedulers/bound.py` with seeded noise.

A model is a function `predict(sample, timesteps, labels)`: (B, C, H, W), (B,), (B,) or None -> the network's output,
(B, C, H, W) or, with a learned variance, (B, 2 C, H, W).
"""

import math

import numpy as np
import torch

from ddpm_hf.evaluation.context import Context
from ddpm_hf.evaluation.registry import Estimate, Findings, mean_estimate, metric, record
from ddpm_hf.schedulers.bound import BITS, bound_terms, fixed_variance_floor, prior_term
from ddpm_hf.utils.seeds import seeded_generator

PILOT_TIMESTEPS, PILOT_IMAGES = 48, 32
UNIFORM_SHARE = 0.1  # of the probability of a timestep, so that no weight exceeds ten times that of uniform sampling
NOISES = 128  # drawn at once; another number would draw other noise
DRAWS = 16  # timesteps per image, of the fast estimate of the bound
MOST_ESTIMATED = 1024  # images of the fast estimate of the bound


def full_bound(predict, scheduler, images, labels, numbers, seed: int, levels: int, batch_size: int = 64):
    """The variational bound of each image in bits/dim, float64: L_T (N,), and the term of each timestep (N, T).

    Args:
        images: (N, C, H, W) in [-1, 1].
        labels: (N,), or None.
        numbers: N indices; the noise of an image is a function of (`seed`, its number).
        levels: number of values of a pixel, evenly spread over [-1, 1].
        batch_size: timesteps per call of the network.
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
    """Probabilities of the timesteps for importance sampling of the bound: float64 (T,), 0 at t = 0.

    They are proportional to the root mean square of the terms (Nichol & Dhariwal 2021, arXiv:2102.09672, equation 18)
    of the first images at a grid of timesteps. The estimate is unbiased for any probabilities.
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

    L_T + L_0 + the mean of L_{t-1} / p(t) over `draws` timesteps t ~ p = `probabilities` (T,). For the other arguments
    see `full_bound`.
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


@metric("bpd", "likelihood", "bound")
def bits_per_dimension(context: Context) -> Findings:
    """The whole bound of a few held-out images, and a fast estimate for many held-out and many training images."""
    held_out, scheduler, predict = context.held_out, context.forward_process, context.predict
    settings = {"seed": context.seed, "levels": held_out.levels, "batch_size": context.batch_size}

    def whole(images, labels, numbers):
        prior, terms = full_bound(predict, scheduler, images, labels, numbers, **settings)
        return prior, terms[:, 1:].sum(1), terms[:, 0]

    parts = context.share(whole, held_out, context.bpd_images, "bits per dimension")
    prior, kl, decoder = (torch.cat(columns) for columns in zip(*parts, strict=True))
    bound, nats = mean_estimate(prior + kl + decoder), math.prod(held_out.shape) / BITS
    rows = {"bpd": record(
        "Bits per dimension (whole variational bound), held-out images", bound,
        total_nats=bound.value * nats, total_nats_stderr=bound.stderr * nats,
        prior=prior.mean().item(), kl=kl.mean().item(), decoder=decoder.mean().item(),
    )}  # fmt: skip
    floor = fixed_variance_floor(scheduler, context.subset(held_out, context.bpd_images)[0], held_out.levels)
    if floor is not None:
        name = "What the fixed variance costs even a network that knows the image"
        rows["bpd_floor"] = record(name, Estimate(floor, None, None))
    name = f"What a code without any model needs for {held_out.levels} equally likely values"
    rows["bpd_uniform"] = record(name, Estimate(math.log2(held_out.levels), None, None))

    probabilities = timestep_probabilities(predict, scheduler, *context.subset(held_out, 32), **settings)

    def fast(images, labels, numbers):
        return estimated_bound(predict, scheduler, images, labels, numbers, probabilities, DRAWS, **settings)

    for key, of, images in (("bpd_fast", "held-out", held_out), ("bpd_fast_train", "training", context.train)):
        bits = torch.cat(context.share(fast, images, MOST_ESTIMATED, "bits per dimension, fast"))
        name = f"Bits per dimension (estimate from {DRAWS} timesteps an image), {of} images"
        rows[key] = record(name, mean_estimate(bits))
    protocol = {"images": context.bpd_images, "levels": held_out.levels, "timesteps": len(scheduler)}
    return Findings(rows, protocol | {"draws_of_estimate": DRAWS})
