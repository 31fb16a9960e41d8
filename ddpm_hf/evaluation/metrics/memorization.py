"""The metric `memorization`: are samples nearer to the training images than images that were never trained on are?"""

import torch

from ddpm_hf.data.neighbours import nearest, nearest_images
from ddpm_hf.evaluation.context import Context, Findings, evenly_spread, metric, record
from ddpm_hf.evaluation.fidelity import Estimate
from ddpm_hf.evaluation.memorization import nearness, share_of_copies
from ddpm_hf.utils.pictures import with_caption

MOST_COMPARED = 1_000  # samples and held-out images whose neighbours are looked for


@metric("memorization", "samples")
def memorization(context: Context) -> Findings:
    """The test of nearness in pixels and, if there is an extractor, in features; and the nearest pairs to look at."""
    pixels = context.samples.pixels[:MOST_COMPARED]
    found, distances = nearest_images(pixels, context.train, 2)
    closest = distances[:, 0].argsort()[:24]
    pairs = torch.stack([pixels[closest], found[closest, 0]], dim=1).flatten(0, 1)
    caption = [
        f"Of {len(pixels):,} samples the {len(closest)} that are nearest to a training image, by pixels:",
        "sample, its nearest training image, next sample ...",
    ]
    pictures = {"memorization": with_caption(context.picture(pairs), caption)}
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
    return Findings(rows, {"most_images": MOST_COMPARED}, pictures)
