"""The seconds in which a recipe becomes good: `python benchmarks/speedrun.py OUT digits digits-flow --seeds 0 1 2`.

From random weights to the end of the recipe, on one thread, everything fixed but the method: the data, the number of
samples, the features and the Fréchet distance that must be reached: 5.0 for digits (1,617 samples, over the features
`digits`) and 20 for MNIST (10,000 samples, over those in DDPM_HF_SHARED/data/features/mnist). A row is a recipe, by
name or as a YAML file such as those in benchmarks/speedrun/, or one of quality.py's contestants `diffusers` and
`diffusers, our former settings`, which train for --seconds because their learning rate follows the clock.

Samples are drawn with at most 20 network evaluations an image: as the pipeline draws them by itself in --steps steps,
or by --solver. The distance of a run is the mean of two sets of samples. Time is CPU time from the first update to the
last: other work on the machine is not counted, nor are loading, saving and sampling. A row has reached the threshold if
the mean distance of its seeds has. Appends to OUT/speedrun.csv and prints the row of SPEEDRUN.md.
"""

import argparse
import contextlib
import csv
import datetime
import statistics
import time
from pathlib import Path

import torch
from quality import MIXED, THEIRS, BudgetSpent, Record, load, our_config, reference, shared, train_theirs

from ddpm_hf import DDPMCustomPipeline
from ddpm_hf.evaluation.features.stats import measure
from ddpm_hf.evaluation.metrics.fidelity import frechet_estimate
from ddpm_hf.training import TrainCallback, train
from ddpm_hf.training.config import resolve
from ddpm_hf.utils.seeds import image_generators

THRESHOLD, SAMPLES = {"digits": 5.0, "mnist": 20.0}, {"digits": 1617, "mnist": 10_000}
EVALUATIONS, BATCH, SAMPLE_SEEDS = 20, 128, (1, 2)


class Stopwatch(TrainCallback):
    """CPU seconds and number of the updates."""

    def on_init_end(self, run):
        self.began = time.process_time()

    def on_step_end(self, run):
        self.seconds, self.updates = time.process_time() - self.began, run.step


def train_recipe(task: str, recipe: str, seed: int, folder: Path) -> tuple[DDPMCustomPipeline, float, int]:
    """The pipeline of a recipe, CPU seconds and the number of updates."""
    data = {} if task == "digits" else {"train_data_dir": str(shared() / "data/mnist")}
    where = {"output_dir": str(folder), "overwrite_output_dir": True, "checkpointing_steps": 10**9}
    watch = Stopwatch()
    run = train(resolve({"config": recipe, "seed": seed, **where, **data}), [watch])
    return run.pipeline, watch.seconds, watch.updates


def train_other(name: str, task: str, seed: int, seconds: float, folder: Path):
    """As `train_recipe`, for diffusers' network and loop."""
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(folder, [seconds])
    with contextlib.suppress(BudgetSpent):
        train_theirs(name, our_config(task, seed, folder), record, lambda: None)
    return load(name, folder / f"{record.update:06d}.safetensors"), record.now, record.update


@torch.no_grad()
def judge(task: str, pipeline: DDPMCustomPipeline, sampler: dict) -> list[float]:
    """The Fréchet distance of each set of samples.

    Raises:
        ValueError: an image takes more network evaluations than are allowed.
    """
    extractor, real, _ = reference(task)
    pipeline.set_progress_bar_config(disable=True)
    counts, found = [0], []
    pipeline.unet.register_forward_hook(lambda *_: counts.append(counts.pop() + 1))
    for seed in SAMPLE_SEEDS:
        images = []
        for numbers in torch.arange(SAMPLES[task]).split(BATCH):
            counts[0] = 0
            generators = image_generators(seed, numbers.tolist())
            images.append(pipeline(len(numbers), generators, output_type="pt", **sampler).images)
            if counts[0] > EVALUATIONS:
                raise ValueError(f"{counts[0]} network evaluations an image; at most {EVALUATIONS} are allowed")
        features = measure(extractor, torch.cat(images).split(BATCH)).features
        found.append(frechet_estimate(features, real.stats).value)
    return found


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    sampler = {"num_inference_steps": args.steps, **({"scheduler": args.solver} if args.solver else {})}
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in args.seeds:
        folder = args.out / f"{args.task}-{Path(args.row).stem.replace(', ', '-').replace(' ', '-')}-{seed}"
        if args.row in (THEIRS, MIXED):
            pipeline, seconds, updates = train_other(args.row, args.task, seed, args.seconds, folder)
        else:
            pipeline, seconds, updates = train_recipe(args.task, args.row, seed, folder)
        distances = judge(args.task, pipeline, sampler)
        row = {"date": datetime.date.today().isoformat(), "task": args.task, "row": Path(args.row).stem, "seed": seed}
        row |= {"seconds": round(seconds, 1), "updates": updates, "distance": round(statistics.mean(distances), 2)}
        rows.append(row | {"sets": " ".join(f"{d:.2f}" for d in distances), "sampler": f"{args.solver} {args.steps}"})
        print(rows[-1], flush=True)
    path = args.out / "speedrun.csv"
    is_new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    mean = statistics.mean(row["distance"] for row in rows)
    reached = "reached" if mean <= THRESHOLD[args.task] else "not reached"
    seconds = statistics.mean(row["seconds"] for row in rows)
    each = ", ".join(f"{row['distance']:.2f}" for row in rows)
    print(f"| {rows[0]['date']} | {rows[0]['row']} | {seconds:.0f} s | {rows[0]['updates']:,} | {each} | {reached} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("task", choices=tuple(THRESHOLD))
    parser.add_argument("row", help="a recipe, its YAML file, or a contestant of quality.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=200.0, help="of training, for the contestants of quality.py")
    parser.add_argument("--solver", help="default: that of the pipeline")
    parser.add_argument("--steps", type=int, default=EVALUATIONS)
    main(parser.parse_args())
