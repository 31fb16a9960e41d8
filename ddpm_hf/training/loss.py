"""The training objective: the loss of a batch of images (Ho et al. 2020, arXiv:2006.11239, equation 14).

The training loop calls an objective as `objective(network, scheduler, batch)`, which returns `Losses`. Any function or
object that is called like `DenoisingLoss` can take its place: `train(config, objective=MyLoss())`.
"""

import math
from typing import NamedTuple

import torch

from ddpm_hf.schedulers.bound import bound_terms, mean_over

VLB_WEIGHT = 0.001  # of the bound in bits/dim, for a learned variance (arXiv:2102.09672, equation 16)


class Batch(NamedTuple):
    """What a network is trained on at a time.

    Args:
        images: (B, C, H, W) in [-1, 1].
        noise: (B, C, H, W), standard normal.
        uniform: (B,) float64 in [0, 1); each objective makes its timesteps of these.
        labels: int64 (B,), the classes; None for an unconditional network.
        valid: bool (B, C, H, W), false for missing values, which the loss must leave out; None: none is missing.
    """

    images: torch.Tensor
    noise: torch.Tensor
    uniform: torch.Tensor
    labels: torch.Tensor | None = None
    valid: torch.Tensor | None = None


class Losses(NamedTuple):
    """Of each image of a batch (B,): the `loss` to minimise, the unweighted `errors` to report, and its `timesteps`."""

    loss: torch.Tensor
    errors: torch.Tensor
    timesteps: torch.Tensor


class DenoisingLoss:
    """Mean squared error of the noise, of x_0 or of v, as the scheduler's `prediction_type` says, over valid values.

    With a learned variance, the loss adds an estimate of the variational bound, whose gradient reaches the variance
    only (Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.1).

    Args:
        snr_gamma: weight the errors by min-SNR-gamma (arXiv:2303.09556); None: all alike.
        levels: values that a pixel can have, for the bound.
    """

    def __init__(self, snr_gamma: float | None = None, levels: int = 256):
        self.snr_gamma, self.levels = snr_gamma, levels

    def __call__(self, network, scheduler, batch: Batch) -> Losses:
        images, noise, uniform, labels, valid = batch
        timesteps = (uniform * len(scheduler)).long()
        noisy = scheduler.add_noise(images, noise, timesteps)
        classes = {} if labels is None else {"class_labels": labels}
        output = network(noisy, timesteps, **classes).sample.float()
        prediction, variance = output[:, : images.shape[1]], output[:, images.shape[1] :]
        squares = (prediction - scheduler.target(images, noise, timesteps)).square()
        errors = squares.mean(dim=(1, 2, 3)) if valid is None else mean_over(squares, valid)
        loss = errors
        if self.snr_gamma is not None:
            loss = scheduler.min_snr_weight(timesteps, self.snr_gamma) * errors
        if scheduler.config.variance_type == "learned_range":
            output = torch.cat([prediction.detach(), variance], dim=1)
            bound = bound_terms(scheduler, images, noisy, timesteps, output, self.levels, valid)
            loss = loss + VLB_WEIGHT * len(scheduler) * bound
        return Losses(loss, errors, timesteps)


def squared_errors(network, scheduler, batch: Batch, timesteps: torch.Tensor) -> Losses:
    """The mean squared error of the network at `timesteps` (B,) over valid values, as loss and as error.

    The scheduler defines x, what the network is given of it, and the target.
    """
    noisy = scheduler.add_noise(batch.images, batch.noise, timesteps)
    classes = {} if batch.labels is None else {"class_labels": batch.labels}
    output = network(scheduler.scale_model_input(noisy, timesteps), timesteps, **classes).sample.float()
    squares = (output - scheduler.target(batch.images, batch.noise, timesteps)).square()
    errors = mean_over(squares, batch.valid)
    return Losses(errors, errors, timesteps)


def normal_quantile(uniform: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers of numbers in [0, 1), increasing; those below 1e-12 as if they were 1e-12."""
    return math.sqrt(2) * torch.erfinv(2 * uniform.clamp(min=1e-12) - 1)
