"""Whether a model repeats its training images rather than make others like them."""

import math

import torch
from scipy.stats import norm, rankdata, tiecorrect

COPY = 1 / 3


def share_of_copies(distances: torch.Tensor) -> float:
    """The share of images that are `COPY` times as far from their nearest training image as from the next, or nearer.

    Args:
        distances: (N, 2), to the two nearest training images (the criterion of Gu et al. 2023, arXiv:2310.02664).
    """
    return (distances[:, 0] <= COPY * distances[:, 1]).double().mean().item()


def nearness(of_samples: torch.Tensor, of_held_out: torch.Tensor) -> dict[str, float]:
    """Are samples nearer to the training images than images that were never trained on are?

    The two-sample test of Meehan, Chaudhuri & Dasgupta 2020 (arXiv:2004.05675, section 3.1, of the whole space): the
    Mann-Whitney statistic of the two sets of distances as a z score, which is about standard normal if they are alike.

    Args:
        of_samples: (N,) distance of each sample to its nearest training image.
        of_held_out: (M,) the same of held-out images.

    Returns:
        `value`: z. Far below 0 the model copies, or its samples are smoother or paler than images are, which brings
        them nearer to all images; far above 0 the samples are unlike the data. `p_value`: the probability of such a z
        or a smaller one if samples and held-out images are alike. `median_ratio`: the median distance of samples over
        that of held-out images; None if the latter is 0.
    """
    n, m = len(of_samples), len(of_held_out)
    ranks = rankdata(torch.cat([of_samples.double(), of_held_out.double()]).numpy())
    u = ranks[:n].sum() - n * (n + 1) / 2
    variance = n * m / 12 * (n + m + 1) * tiecorrect(ranks)
    z = (u - n * m / 2) / math.sqrt(variance) if variance > 0 else 0.0
    unseen = of_held_out.double().median().item()
    ratio = of_samples.double().median().item() / unseen if unseen > 0 else None
    return {"value": float(z), "p_value": float(norm.cdf(z)), "median_ratio": ratio}
