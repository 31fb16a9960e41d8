"""The metric `memorization`: are samples nearer to the training images than held-out images are?"""

import math

import torch
from scipy.stats import norm, rankdata, tiecorrect

from ddpm_hf.data.neighbours import nearest, nearest_images
from ddpm_hf.evaluation.context import Context, evenly_spread
from ddpm_hf.evaluation.registry import Estimate, Findings, metric, record

COPY = 1 / 3
MOST_COMPARED = 1_000  # samples and held-out images whose neighbours are searched


def share_of_copies(distances: torch.Tensor) -> float:
    """The share of images whose nearest training image is at most `COPY` times as far away as the second nearest.

    This is the criterion of Gu et al. 2023, arXiv:2310.02664.

    Args:
        distances: (N, 2), to the two nearest training images.
    """
    return (distances[:, 0] <= COPY * distances[:, 1]).double().mean().item()


def nearness(of_samples: torch.Tensor, of_held_out: torch.Tensor) -> dict[str, float]:
    """Test whether samples are nearer to the training images than held-out images are.

    The two-sample test of Meehan, Chaudhuri & Dasgupta 2020 (arXiv:2004.05675, section 3.1, over the whole space): the
    z score of the Mann-Whitney statistic of the two sets of distances, about standard normal if they are alike.

    Args:
        of_samples: (N,) distance of each sample to its nearest training image.
        of_held_out: (M,) distance of each held-out image to its nearest training image.

    Returns:
        `value`: z. Far below 0 the model copies, or its samples are smoother or paler than real images, which brings
        them nearer to all images. Far above 0 the samples are unlike the data. `p_value`: the probability of this z or
        a smaller one if samples and held-out images are alike. `median_ratio`: the median distance of samples divided
        by that of held-out images; None if the latter is 0.
    """
    n, m = len(of_samples), len(of_held_out)
    ranks = rankdata(torch.cat([of_samples.double(), of_held_out.double()]).numpy())
    u = ranks[:n].sum() - n * (n + 1) / 2
    variance = n * m / 12 * (n + m + 1) * tiecorrect(ranks)
    z = (u - n * m / 2) / math.sqrt(variance) if variance > 0 else 0.0
    unseen = of_held_out.double().median().item()
    ratio = of_samples.double().median().item() / unseen if unseen > 0 else None
    return {"value": float(z), "p_value": float(norm.cdf(z)), "median_ratio": ratio}


@metric("memorization", "samples")
def memorization(context: Context) -> Findings:
    """Test nearness in pixels and, with an extractor, in features; show the pairs that are nearest in pixels."""
    pixels = context.samples.pixels[:MOST_COMPARED]
    found, distances = nearest_images(pixels, context.train, 2)
    closest = distances[:, 0].argsort()[:24]
    pairs = torch.stack([pixels[closest], found[closest, 0]], dim=1).flatten(0, 1)
    picture = context.picture(
        pairs,
        title=f"of {len(pixels):,} samples the {len(closest)} that are nearest to a training image",
        column_names=["sample", "nearest"] * 4,
        captions=[f"{distance:.3f}" for distance in distances[closest, 0] / math.prod(pixels.shape[1:]) ** 0.5],
        notes="below each pair: the root mean square difference of their pixels in [-1, 1]",
        gaps=dict.fromkeys((2, 4, 6), 3),
    )
    compared, rows = {}, {}
    if context.has_held_out:
        unseen, _ = context.subset(context.held_out, MOST_COMPARED)
        compared["pixels"] = distances, nearest_images(unseen, context.train, 2)[1]
        if context.references:
            train, held_out = (context.references[split].features for split in ("train", "held_out"))
            queries = context.samples.features[:MOST_COMPARED], evenly_spread(held_out, MOST_COMPARED)
            compared["features"] = tuple(nearest(each, train, 2)[1] for each in queries)
    for name, (of_samples, of_unseen) in compared.items():
        test = nearness(of_samples[:, 0], of_unseen[:, 0])
        z = Estimate(test.pop("value"), None, len(of_samples))
        copies = {"copies": share_of_copies(of_samples), "copies_held_out": share_of_copies(of_unseen)}
        words = f"Are samples nearer to training images than unseen images are? z, in {name}"
        rows[f"memorization_{name}"] = record(words, z, **test, **copies, n_held_out=len(of_unseen))
    return Findings(rows, {"most_images": MOST_COMPARED}, {"memorization": picture})
