"""The metric `loss`: the loss, the bound and the calibration of the predicted x_0 by timestep."""

import math

import torch

from ddpm_hf.evaluation.context import Context
from ddpm_hf.evaluation.registry import Findings, mean_estimate, metric, record
from ddpm_hf.schedulers.bound import bound_terms
from ddpm_hf.utils.seeds import seeded_generator

TIMESTEPS = 50
MOST_BY_TIMESTEP = 256  # images


def measure_by_timestep(
    predict, scheduler, images, labels, numbers, seed: int, levels: int, batch_size: int = 64
) -> torch.Tensor:
    """Measure a network's predictions for images (N, C, H, W) in [-1, 1], each at M timesteps.

    Args:
        predict, labels, numbers, levels: see `likelihood.full_bound`.

    Returns:
        (N, 7, M) float64 at `scheduler.midpoints(TIMESTEPS)`: the squared error of the prediction (L_simple), the term
        of the bound in bits/dim (NaN where there is no bound), and the means over the pixels of x_0, of the predicted
        x_0 p, of p^2, of x_0 p and of (p - x_0)^2.
    """
    timesteps, found = scheduler.midpoints(TIMESTEPS), []
    for k, number in enumerate(numbers):
        generator = seeded_generator(seed, "by timestep", number)
        noise = torch.randn((len(timesteps), *images.shape[1:]), generator=generator, dtype=torch.float64)
        parts = []
        for t, z in zip(timesteps.split(batch_size), noise.split(batch_size), strict=True):
            x0 = images[k : k + 1].double().expand_as(z)
            sample = scheduler.add_noise(x0, z, t)
            model_input = scheduler.scale_model_input(sample, t)
            output = predict(model_input, t, None if labels is None else labels[k].expand(len(t)))
            errors = (output[:, : x0.shape[1]] - scheduler.target(x0, z, t)).square()
            if scheduler.has_bound:
                bits = bound_terms(scheduler, x0, sample, t, output, levels)
                p = scheduler.reverse(output, sample, t)[2]
            else:
                bits, p = torch.full((len(t),), math.nan), scheduler.predicted_original(output, t, sample)
            loss, *others = (x.flatten(1).mean(1) for x in (errors, x0, p, p * p, x0 * p, (p - x0).square()))
            parts.append(torch.stack([loss, bits, *others]))
        found.append(torch.cat(parts, 1))
    return torch.stack(found) if found else torch.empty(0, 7, len(timesteps), dtype=torch.float64)


def columns_by_timestep(measured: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns of by_timestep.csv, (M,): means over the images of what `measure_by_timestep` returns.

    `loss` is L_simple and `bits` the term of the bound in bits/dim. `x0_rmse` and `x0_bias` are the root mean square
    and the mean of the predicted x_0 minus the true one. `x0_slope` is the slope of the regression of the true x_0 on
    the predicted one: 1 for the best possible prediction, E[x_0 | x_t], and less for overconfident ones. It is NaN
    where all predictions are the same.
    """
    loss, bits, x0, p, p_p, x0_p, square = measured.mean(0)
    variance = p_p - p**2
    slope = torch.where(variance > 1e-12, (x0_p - x0 * p) / variance.clamp(min=1e-12), math.nan)
    return {"loss": loss, "bits": bits, "x0_rmse": square.sqrt(), "x0_slope": slope, "x0_bias": p - x0}


@metric("loss", "likelihood")
def loss(context: Context) -> Findings:
    """The mean squared error of the prediction; by timestep also the bound and the calibration of x_0."""
    scheduler = context.forward_process
    timesteps, rows, curves = scheduler.midpoints(TIMESTEPS), {}, {}
    for key, of, images in (("loss_held_out", "held-out", context.held_out), ("loss_train", "training", context.train)):

        def measure(part, labels, numbers, levels=images.levels):
            return measure_by_timestep(
                context.predict, scheduler, part, labels, numbers, context.seed, levels,
                context.batch_size,
            )  # fmt: skip

        measured = torch.cat(context.share(measure, images, MOST_BY_TIMESTEP, f"loss, {of} images"))
        name = f"Mean squared error of the prediction, mean over timesteps, {of} images"
        rows[key] = record(name, mean_estimate(measured[:, 0].mean(1)))
        curves[key] = columns_by_timestep(measured)
    held_out = curves["loss_held_out"]
    columns = {"timestep": timesteps, "loss_held_out": held_out.pop("loss"), "loss_train": curves["loss_train"]["loss"]}
    columns |= held_out
    if not scheduler.has_bound:
        del columns["bits"]
    by_timestep = [
        {name: value if math.isfinite(value) else None for name, value in zip(columns, row, strict=True)}
        for row in zip(*(column.tolist() for column in columns.values()), strict=True)
    ]
    protocol = {"images": MOST_BY_TIMESTEP, "timesteps": len(timesteps)}
    return Findings(rows, protocol, by_timestep=by_timestep)
