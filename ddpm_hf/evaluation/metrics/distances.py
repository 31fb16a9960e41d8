"""The metrics over features: `fd`, `kid`, `prdc` and `is`, each beside what held-out real images score."""

import math
from collections.abc import Callable

from ddpm_hf.evaluation.context import SPLITS, Context, Findings, evenly_spread, metric, record
from ddpm_hf.evaluation.fidelity import (
    Estimate,
    frechet_estimate,
    inception_score,
    kernel_distance,
    precision_recall_density_coverage,
)

NEIGHBOURS = 5  # k of precision, recall, density and coverage


@metric("fd", "samples", "features")
def frechet(context: Context) -> Findings:
    """The Fréchet distance, called FID over the features of the Inception of 2015 alone."""
    inception = context.extractor.is_inception_2015
    key, name = ("fid", "FID") if inception else ("fd", f"Fréchet distance ({context.extractor.name} features)")
    return _distances(context, key, name, lambda features, reference: frechet_estimate(features, reference.stats), True)


@metric("kid", "samples", "features")
def kernel(context: Context) -> Findings:
    """The kernel distance, which is not biased by the number of images."""
    name = f"Kernel distance, KID ({context.extractor.name} features)"
    return _distances(context, "kid", name, lambda features, of: kernel_distance(features, of.features), False)


def _distances(context: Context, key: str, name: str, distance: Callable, biased: bool) -> Findings:
    """Of samples to training and to held-out images, and of held-out to training images.

    Args:
        distance: features (N, D) and a `Measured` reference -> an `Estimate`.
        biased: that a distance of fewer images is larger; if there are fewer held-out images than samples, a distance
            of as many samples stands beside theirs.
    """
    samples, real, train = context.samples.features, context.held_out_features(), context.references["train"]
    compared = {
        split: (f"to the {SPLITS[split]} images", samples, reference) for split, reference in context.references.items()
    }
    if real is not None and biased and len(real) < len(samples):
        words = "to the training images, of as many samples as held-out images"
        compared["train_matched"] = words, samples[: len(real)], train
    if real is not None:
        compared["real"] = "of held-out to training images", real, train
    return Findings({
        f"{key}_{of}": record(f"{name} {words}", distance(images, reference), n_reference=len(reference.features))
        for of, (words, images, reference) in compared.items()
    })  # fmt: skip


@metric("prdc", "samples", "features")
def neighbourhoods(context: Context) -> Findings:
    """Precision, recall, density and coverage."""
    samples, rows = context.samples.features, {}
    for split, of in context.references.items():
        n = min(len(samples), len(of.features))
        values = precision_recall_density_coverage(evenly_spread(of.features, n), samples[:n], NEIGHBOURS)
        for name, value in values.items():
            rows[f"{name}_{split}"] = record(f"{name.capitalize()}, {SPLITS[split]} images", value)
    return Findings(rows, {"k": NEIGHBOURS, "images": "as many of each as there are of the fewer"})


@metric("is", "samples", "features", "logits")
def inception(context: Context) -> Findings:
    """The Inception Score."""
    of, samples = context.extractor, context.samples.logits
    name = "Inception Score" + ("" if of.is_inception_2015 else f" ({of.name} classifier)")
    scored = {"inception_score": (name, samples)}
    if context.has_held_out:
        real = evenly_spread(context.references["held_out"].logits, context.num_samples)
        if len(real) < len(samples):
            words = f"{name}, of as many samples as held-out images"
            scored["inception_score_matched"] = words, samples[: len(real)]
        scored["inception_score_real"] = f"{name} of held-out images", real
    rows = {}
    for key, (words, logits) in scored.items():
        splits = max(2, min(10, len(logits) // 50))
        value, spread = inception_score(logits, splits)
        rows[key] = record(words, Estimate(value, spread / math.sqrt(splits - 1), len(logits)), splits=splits)
    return Findings(rows)
