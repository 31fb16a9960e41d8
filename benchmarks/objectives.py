"""How fast samples become legible when the network predicts the noise, x_0 or v: `python benchmarks/objectives.py OUT`.

The recipe `digits` three times with nothing else changed. The network is the same and the loss differs by a
multiplication, so an update costs the same in all three; how long it takes wanders with what else the machine does.
The seconds of the picture are therefore updates times the median of what 150 of them took in all three runs. The time
that the measuring takes is no part of it. Writes objectives.csv, objectives.png and the last samples of each.
"""

import csv
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ddpm_hf.evaluation.legibility import digits_legibility
from ddpm_hf.schedulers.noise import PREDICTION_TYPES
from ddpm_hf.training import TrainCallback, train
from ddpm_hf.training.config import resolve
from ddpm_hf.utils.pictures import grid

SAMPLES, STEPS, EVERY = 256, 50, 150


def measured_run(prediction_type: str, out: Path) -> list[dict]:
    """Rows of seconds of training and share of legible samples."""
    rows, clock = [], {"began": time.monotonic(), "measuring": 0.0}

    def measure(run):
        now = time.monotonic()
        run.pipeline.set_progress_bar_config(disable=True)
        share = digits_legibility(run.pipeline, STEPS, seed=1, num_samples=SAMPLES).samples
        seconds = now - clock["began"] - clock["measuring"]
        rows.append({"objective": prediction_type, "update": run.step, "seconds": round(seconds, 1), "legible": share})
        print(rows[-1], flush=True)
        if run.finished:
            images = run.pipeline(64, torch.Generator().manual_seed(1), STEPS, output_type="np").images
            grid(images, 8, title=f"{prediction_type}, 64 samples").save(out / f"objectives-{prediction_type}.png")
        clock["measuring"] += time.monotonic() - now

    config = resolve({"config": "digits", "prediction_type": prediction_type, "checkpointing_steps": EVERY,
                      "output_dir": str(out / "runs" / prediction_type), "overwrite_output_dir": True})  # fmt: skip
    callback = TrainCallback()
    callback.on_init_end = lambda run: clock.update(began=time.monotonic())
    callback.on_save = measure
    train(config, [callback])
    return rows


def draw(rows: list[dict], path: Path) -> None:
    took = []
    for k, row in enumerate(rows):
        before = rows[k - 1]["seconds"] if row["update"] > EVERY else 0.0
        took.append(row["seconds"] - before)
    an_update = statistics.median(took) / EVERY
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for prediction_type in PREDICTION_TYPES:
        of_this = [row for row in rows if row["objective"] == prediction_type]
        share = [row["legible"] for row in of_this]
        errors = [200 * math.sqrt(p * (1 - p) / SAMPLES) for p in share]
        seconds = [row["update"] * an_update for row in of_this]
        axes.errorbar(seconds, [100 * p for p in share], errors, label=prediction_type, capsize=2)
    axes.set(
        xlabel=f"seconds of training (median {1000 * an_update:.0f} ms an update)",
        ylabel=f"legible samples, % of {SAMPLES}, ± 2 standard errors",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for prediction_type in PREDICTION_TYPES for row in measured_run(prediction_type, out)]
    with open(out / "objectives.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, out / "objectives.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
