"""The metric `drift`: do the colours of samples differ from those of training images?"""

import logging
import math

import torch

from ddpm_hf.evaluation.context import Context, channel_moments
from ddpm_hf.evaluation.registry import Estimate, Findings, metric, record

TINT = 0.05  # of the mean of a channel, in [-1, 1]: 6 of 255 values
log = logging.getLogger(__name__)


@metric("drift", "samples")
def drift(context: Context) -> Findings:
    """The mean and standard deviation of each channel of the samples, minus those of the training images."""
    batches = torch.arange(len(context.train)).split(1024)
    of_train = mean_and_std(torch.cat([channel_moments(context.train.batch(batch)) for batch in batches]))
    of_samples, rows = mean_and_std(context.samples.moments), {}
    for key, words, samples, train in zip(("mean", "std"), ("mean", "standard deviation"), of_samples, of_train):
        difference = samples[0] - train[0]
        largest = difference.abs().argmax()
        stderr = (samples[1] ** 2 + train[1] ** 2).sqrt()[largest].item()
        value = Estimate(difference[largest].abs().item(), stderr, len(context.samples.moments))
        rows[f"channel_{key}_drift"] = record(
            f"Largest difference of a channel's {words}, pixels in [-1, 1]",
            value,
            channels=difference.tolist(),
            samples=samples[0].tolist(),
            train=train[0].tolist(),
        )
    drifted = rows["channel_mean_drift"]
    if drifted["value"] > max(TINT, 3 * drifted["stderr"]):
        drifted["advice"] = _advice(context.pipeline.scheduler.config)
        log.warning(
            f"the samples are tinted: the mean of a channel differs by {drifted['value']:.2f}. {drifted['advice']}"
        )
    return Findings(rows)


def _advice(config) -> str:
    """What reduces a difference of the means; Lin et al. 2023, arXiv:2305.08891, explain why."""
    if config.get("prediction_type", "epsilon") == "epsilon":
        return (
            "At the first steps of sampling, a small error of a predicted noise is a large one of the image; training "
            "with --prediction_type v_prediction often helps, also with rescale_betas_zero_snr=true in --scheduler."
        )
    return "More sampling steps (--num_inference_steps) or a longer training often help."


def mean_and_std(moments: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Mean and standard deviation of each channel over all pixels, (C,), each with its standard error over the images.

    Args:
        moments: (N, 2, C), from `channel_moments`.
    """
    mean, square = moments.mean(0)
    std = (square - mean**2).clamp(min=0).sqrt()
    # The delta method per image: d std = (d square - 2 mean d mean) / (2 std)
    linear = (moments[:, 1] - 2 * mean * moments[:, 0]) / (2 * std.clamp(min=1e-12))
    spread, spread_of_std = (
        rows.std(0) / math.sqrt(len(rows)) if len(rows) > 1 else rows[0] * math.nan for rows in (moments[:, 0], linear)
    )
    return (mean, spread), (std, spread_of_std)
