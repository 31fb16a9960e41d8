"""The metric `structure`: do samples have the structure of images, or are they noise?

Samples that are noise can have a precision of 1 and be "no nearer" to training images than held-out images are, so this
metric is measured whenever there are samples.
"""

import math

import torch

from ddpm_hf.evaluation.context import Context
from ddpm_hf.evaluation.registry import Estimate, Findings, metric, record

MOST_COMPARED = 1_000  # images of each kind


def neighbour_correlation(images: torch.Tensor) -> Estimate:
    """The correlation of horizontally and vertically neighbouring pixels: near 0 in noise, near 1 in smooth images.

    It is computed from deviations from the mean image, because the mean image plus noise is noise too.

    Args:
        images: (N, C, H, W).
    """
    apart = images.double() - images.double().mean(0)
    pairs = ((apart[..., 1:, :], apart[..., :-1, :]), (apart[..., :, 1:], apart[..., :, :-1]))
    products = sum((a * b).flatten(1).sum(1) for a, b in pairs)  # (N,)
    squares = sum((a.square() + b.square()).flatten(1).sum(1) / 2 for a, b in pairs)
    if not squares.sum() > 0:
        return Estimate(0.0, None, len(images))
    value = products.sum() / squares.sum()
    error = (products - value * squares).std() / (math.sqrt(len(images)) * squares.mean())
    return Estimate(float(value), float(error), len(images))


@metric("structure", "samples")
def structure(context: Context) -> Findings:
    """The correlation of neighbouring pixels, of samples and of training images."""
    real = neighbour_correlation(context.subset(context.train, MOST_COMPARED)[0])
    found = neighbour_correlation(context.samples.pixels[:MOST_COMPARED])
    row = record("Correlation of neighbouring pixels in samples", found, training_images=real.value)
    return Findings({"neighbour_correlation": row})
