"""The metrics of likelihood: `bpd`, the variational bound of an image, and `loss`, the error by timestep."""

import math

import torch

from ddpm_hf.evaluation.context import Context, Findings, mean, metric, record
from ddpm_hf.evaluation.diagnostics import chosen_timesteps, columns_by_timestep, measure_by_timestep
from ddpm_hf.evaluation.fidelity import Estimate
from ddpm_hf.evaluation.likelihood import estimated_bound, full_bound, timestep_probabilities
from ddpm_hf.schedulers.bound import BITS, fixed_variance_floor

DRAWS = 16  # timesteps an image, of the fast estimate of the bound
MOST_BY_TIMESTEP = 256  # images
MOST_ESTIMATED = 1024  # images of the fast estimate of the bound


@metric("bpd", "likelihood")
def bits_per_dimension(context: Context) -> Findings:
    """The whole bound of a few held-out images in parts, and a fast estimate of many, of held-out and training ones."""
    held_out, scheduler, predict = context.held_out, context.noise_scheduler, context.predict
    settings = {"seed": context.seed, "levels": held_out.levels, "batch_size": context.batch_size}

    def whole(images, labels, numbers):
        prior, terms = full_bound(predict, scheduler, images, labels, numbers, **settings)
        return prior, terms[:, 1:].sum(1), terms[:, 0]

    parts = context.share(whole, held_out, context.bpd_images, "bits per dimension")
    prior, kl, decoder = (torch.cat(columns) for columns in zip(*parts, strict=True))
    bound, nats = mean(prior + kl + decoder), math.prod(held_out.shape) / BITS
    rows = {"bpd": record(
        "Bits per dimension (whole variational bound), held-out images", bound,
        total_nats=bound.value * nats, total_nats_stderr=bound.stderr * nats,
        prior=prior.mean().item(), kl=kl.mean().item(), decoder=decoder.mean().item(),
    )}  # fmt: skip
    floor = fixed_variance_floor(scheduler, context.subset(held_out, context.bpd_images)[0], held_out.levels)
    if floor is not None:
        name = "What the fixed variance costs even a network that knows the image"
        rows["bpd_floor"] = record(name, Estimate(floor, None, None))

    probabilities = timestep_probabilities(predict, scheduler, *context.subset(held_out, 32), **settings)

    def fast(images, labels, numbers):
        return estimated_bound(predict, scheduler, images, labels, numbers, probabilities, DRAWS, **settings)

    for key, of, images in (("bpd_fast", "held-out", held_out), ("bpd_fast_train", "training", context.train)):
        bits = torch.cat(context.share(fast, images, MOST_ESTIMATED, "bits per dimension, fast"))
        name = f"Bits per dimension (estimate from {DRAWS} timesteps an image), {of} images"
        rows[key] = record(name, mean(bits))
    protocol = {"images": context.bpd_images, "levels": held_out.levels, "timesteps": len(scheduler)}
    return Findings(rows, protocol | {"draws_of_estimate": DRAWS})


@metric("loss", "likelihood")
def loss(context: Context) -> Findings:
    """The mean squared error of the prediction, and by timestep the bound and the calibration of x_0 as well."""
    timesteps, rows, curves = chosen_timesteps(context.noise_scheduler), {}, {}
    for key, of, images in (("loss_held_out", "held-out", context.held_out), ("loss_train", "training", context.train)):

        def look(part, labels, numbers, levels=images.levels):
            return measure_by_timestep(
                context.predict, context.noise_scheduler, part, labels, numbers, context.seed, levels,
                context.batch_size,
            )  # fmt: skip

        measured = torch.cat(context.share(look, images, MOST_BY_TIMESTEP, f"loss, {of} images"))
        name = f"Mean squared error of the prediction, mean over timesteps, {of} images"
        rows[key] = record(name, mean(measured[:, 0].mean(1)))
        curves[key] = columns_by_timestep(measured)
    held_out = curves["loss_held_out"]
    columns = {"timestep": timesteps, "loss_held_out": held_out.pop("loss"), "loss_train": curves["loss_train"]["loss"]}
    columns |= held_out
    by_timestep = [
        {name: value if math.isfinite(value) else None for name, value in zip(columns, row, strict=True)}
        for row in zip(*(column.tolist() for column in columns.values()), strict=True)
    ]
    protocol = {"images": MOST_BY_TIMESTEP, "timesteps": len(timesteps)}
    return Findings(rows, protocol, by_timestep=by_timestep)
