"""Do the distances order what is known to be in order? `python benchmarks/orderings.py MODEL EARLY FEATURES OUT`.

MODEL is a finished run of the recipe `mnist` and EARLY one of a part of its updates (`--max_train_steps`); FEATURES the
spec of a feature network for MNIST. Of each of five sets 2,000 images are compared with the training images: held-out
real images, samples of the averaged weights of MODEL and of EARLY (DDIM, 20 steps), the held-out images blurred, and
noise. Prints a table with 95 % intervals, says whether those of neighbours are disjoint, and writes orderings.csv and
orderings.png, a row of images a set.
"""

import csv
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import conv2d, pad

from ddpm_hf.data.dataset import ImageData, load_images
from ddpm_hf.evaluation.features.choose import make_extractor
from ddpm_hf.evaluation.features.stats import measure, measure_cached, unit_batches
from ddpm_hf.evaluation.metrics.fidelity import frechet_estimate, kernel_distance, precision_recall_density_coverage
from ddpm_hf.evaluation.reference import data_config, train_config_path
from ddpm_hf.pipelines.images import from_unit
from ddpm_hf.pipelines.pipeline import load_pipeline
from ddpm_hf.utils.pictures import grid
from ddpm_hf.utils.seeds import image_generators

N, BATCH, SIGMA, SHOWN = 2000, 100, 1.5, 16


def samples(model: str, kept: Path) -> torch.Tensor:
    """(N, C, H, W) in [0, 1], from the file if there is one of an earlier run."""
    if kept.exists():
        return torch.from_numpy(np.load(kept))
    pipeline = load_pipeline(model, "model")
    pipeline.set_progress_bar_config(disable=True)
    parts = [range(k, k + BATCH) for k in range(0, N, BATCH)]
    of = [pipeline(BATCH, image_generators(0, part), 20, "pt", scheduler="ddim").images for part in parts]
    np.save(kept, torch.cat(of).numpy())
    return torch.cat(of)


def blurred(images: torch.Tensor) -> torch.Tensor:
    at = torch.arange(-4, 5)
    weights = (-(at**2) / (2 * SIGMA**2)).exp()
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    return conv2d(pad(images, (4, 4, 4, 4), mode="replicate"), kernel[None, None])


def main(model: str, early: str, features: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(model, "model")
    config = data_config(model, train_config_path(model), pipeline, None, None, {}, out / "evaluation.json")
    train, held_out = load_images(config, test_limit=N)
    extractor = make_extractor(features, train.shape[0])
    reference = measure_cached(extractor, train, out / "cache")
    chosen = torch.linspace(0, len(train) - 1, N).round().long()
    some = measure(extractor, unit_batches(ImageData(train.pixels[chosen]))).features
    real = torch.cat(list(unit_batches(held_out)))
    sets = {
        "held-out real": real,
        "samples": samples(model, out / "samples.npy"),
        "early samples": samples(early, out / "early.npy"),
        "blurred real": blurred(real).clamp(0, 1),
        "noise": torch.rand(real.shape, generator=torch.Generator().manual_seed(0)),
    }
    rows = []
    for name, images in sets.items():
        found = measure(extractor, images.split(BATCH)).features
        estimates = {"fd": frechet_estimate(found, reference.stats), "kid": kernel_distance(found, reference.features)}
        estimates |= precision_recall_density_coverage(some, found)
        row = {"set": name, "n": len(found)}
        for key, estimate in estimates.items():
            row |= {key: estimate.value, f"{key}_stderr": estimate.stderr}
        rows.append(row)
        print(name, {key: f"{e.value:.4g} ± {1.96 * e.stderr:.2g}" for key, e in estimates.items()}, flush=True)
    for key in ("fd", "kid"):
        ends = [[row[key] + sign * 1.96 * row[f"{key}_stderr"] for sign in (-1, 1)] for row in rows]
        apart = [a[1] < b[0] for a, b in pairwise(ends)]
        print(f"{key}: {'in order, intervals disjoint' if all(apart) else f'NOT all disjoint: {apart}'}")
    with open(out / "orderings.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    shown = torch.cat([images[:: N // SHOWN][:SHOWN] for images in sets.values()])
    title = "images of each set, from the best to the worst"
    grid(from_unit(shown, "np"), SHOWN, title=title, row_names=list(sets)).save(out / "orderings.png")


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
