"""The loss, the bound and the predicted x_0 of a model by timestep, and the colours of its samples."""

import math

import torch

from ddpm_hf.schedulers.bound import bound_terms
from ddpm_hf.utils.seeds import seeded_generator

TIMESTEPS = 50


def chosen_timesteps(scheduler) -> torch.Tensor:
    """(M,), M = min(`TIMESTEPS`, T): the middles of M equal parts of 0 ... T-1."""
    T = len(scheduler)
    M = min(TIMESTEPS, T)
    return ((torch.arange(M) + 0.5) * T / M).long()


def measure_by_timestep(
    predict, scheduler, images, labels, numbers, seed: int, levels: int, batch_size: int = 64
) -> torch.Tensor:
    """What a network predicts for images (N, C, H, W) in [-1, 1], each at all M `chosen_timesteps`.

    Args:
        predict, labels, levels: as in `likelihood`.
        numbers: N; the noise of an image is a function of (`seed`, its number).

    Returns:
        (N, 7, M) float64: the squared error of the prediction (L_simple), the term of the bound in bits/dim, and the
        means over the pixels of x_0, of the predicted x_0 p, of p^2, of x_0 p and of (p - x_0)^2.
    """
    timesteps, found = chosen_timesteps(scheduler), []
    for k, number in enumerate(numbers):
        generator = seeded_generator(seed, "by timestep", number)
        noise = torch.randn((len(timesteps), *images.shape[1:]), generator=generator, dtype=torch.float64)
        parts = []
        for t, z in zip(timesteps.split(batch_size), noise.split(batch_size), strict=True):
            x0 = images[k : k + 1].double().expand_as(z)
            sample = scheduler.add_noise(x0, z, t)
            output = predict(sample, t, None if labels is None else labels[k].expand(len(t)))
            prediction, _ = scheduler.split_output(output, sample)
            errors = (prediction - scheduler.target(x0, z, t)).square()
            bits = bound_terms(scheduler, x0, sample, t, output, levels)
            p = scheduler.reverse(output, sample, t)[2]
            loss, *others = (x.flatten(1).mean(1) for x in (errors, x0, p, p * p, x0 * p, (p - x0).square()))
            parts.append(torch.stack([loss, bits, *others]))
        found.append(torch.cat(parts, 1))
    return torch.stack(found) if found else torch.empty(0, 7, len(timesteps), dtype=torch.float64)


def columns_by_timestep(measured: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means over images of what `measure_by_timestep` returns, each (M,): the columns of by_timestep.csv.

    `loss` is L_simple and `bits` the term of the bound in bits/dim. `x0_rmse` and `x0_bias` are of the predicted x_0
    less the true one. `x0_slope` is the slope of the regression of the true x_0 on the predicted one: 1 for
    E[x_0 | x_t], the best possible prediction, and less for predictions that are too bold. It is NaN where all
    predictions are the same.
    """
    loss, bits, x0, p, p_p, x0_p, square = measured.mean(0)
    variance = p_p - p**2
    slope = torch.where(variance > 1e-12, (x0_p - x0 * p) / variance.clamp(min=1e-12), math.nan)
    return {"loss": loss, "bits": bits, "x0_rmse": square.sqrt(), "x0_slope": slope, "x0_bias": p - x0}


def channel_moments(images: torch.Tensor) -> torch.Tensor:
    """Mean and mean square of the pixels of each channel of each image: (B, C, H, W) -> (B, 2, C), float64."""
    pixels = images.double().flatten(2)
    return torch.stack([pixels.mean(2), pixels.square().mean(2)], dim=1)
