"""The metric `drift`: do the colours of samples differ from those of training images?"""

import math

import torch

from ddpm_hf.evaluation.context import Context, channel_moments
from ddpm_hf.evaluation.registry import Estimate, Findings, metric, record


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
    return Findings(rows)


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
