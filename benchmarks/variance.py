"""What a learned variance does to bits/dim and to few steps: `python benchmarks/variance.py FIXED LEARNED OUT`.

FIXED and LEARNED are runs of the recipe `digits`, the second with `--learned_variance true`. Of FIXED there are two
models, with the variances fixed_small and fixed_large: the network is the same. Each is evaluated by `ddpm-hf evaluate`
(all 180 held-out digits, the whole bound; 1,617 samples, as many as there are training images, in 5 to 100 steps of
ancestral sampling). Prints a table and writes variance.csv.
"""

import csv
import shutil
import sys
from pathlib import Path

from ddpm_hf import DDPMCustomPipeline
from ddpm_hf.evaluation.evaluate import evaluate

STEPS, SAMPLES, IMAGES = (5, 10, 25, 50, 100), 1617, 180


def with_variance(model: Path, variance_type: str, out: Path) -> Path:
    pipeline = DDPMCustomPipeline.from_pretrained(model)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, variance_type=variance_type)
    pipeline.save_pretrained(out / variance_type)
    shutil.copy(model / "train_config.json", out / variance_type)
    return out / variance_type


def main(fixed: Path, learned: Path, out: Path) -> None:
    models = {name: with_variance(fixed, name, out) for name in ("fixed_small", "fixed_large")}
    models["learned_range"] = learned
    rows = []
    for name, model in models.items():
        found = evaluate(model, metrics=("bpd", "loss"), bpd_images=IMAGES, output=out / f"{name}-bpd.json")["metrics"]
        row = {"variance": name}
        for key in ("bpd", "bpd_fast", "loss_held_out"):
            row |= {key: found[key]["value"], f"{key}_stderr": found[key]["stderr"]}
        row |= {part: found["bpd"][part] for part in ("prior", "kl", "decoder")}
        for steps in STEPS:
            output = out / f"{name}-{steps}.json"
            settings = {"num_samples": SAMPLES, "num_inference_steps": steps, "output": output}
            found = evaluate(model, metrics=("fd",), scheduler="ddpm", **settings)["metrics"]
            row |= {f"fd_{steps}": found["fd_train"]["value"], f"fd_{steps}_stderr": found["fd_train"]["stderr"]}
        print(row, flush=True)
        rows.append(row)
    with open(out / "variance.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print("\n| variance | bits/dim | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |")
    print("|---|---|" + "---|" * len(STEPS))
    for row in rows:
        cells = [f"{row[key]:.2f} ± {1.96 * row[f'{key}_stderr']:.2f}" for key in ("bpd", *(f"fd_{s}" for s in STEPS))]
        print(f"| `{row['variance']}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
