"""Did anything get worse? `python benchmarks/before.py CHECKOUT OUT`, CHECKOUT being a clone at an older commit.

The same commands with the package of CHECKOUT ("before") and with this one ("now"), each in a process of its own that
starts, works and ends, in turns: before now now before ... Told are medians over `--rounds`, of seconds, of the
process's peak memory and of the ratios of seconds (now by before: above 1 is worse), and the largest difference between
the pixels that both sample from the same model with the same seed, in levels of 255. Below the commands, single calls:
there a process tells the median of many. Writes before.csv into OUT.
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
COLUMNS = ("command", "before_s", "now_s", "ratio", "lowest", "highest", "before_MiB", "now_MiB", "levels", "rounds")
DDPM_HF = ("-m", "ddpm_hf")
UNTRAINED = """
import torch
from ddpm_hf import DDPMCustomPipeline, DDPMUNet, LinearNoiseScheduler
try:
    from ddpm_hf.training.config import load_recipe
except ImportError:  # of a checkout from before the rooms
    from ddpm_hf.config import load_recipe
torch.manual_seed(0)
unet = DDPMUNet(**{"sample_size": 32, "in_channels": 3, **load_recipe("ddpm-cifar10")["unet"]})
DDPMCustomPipeline(unet, LinearNoiseScheduler()).save_pretrained("cifar10")
"""

SCHEDULER = """
import torch
from ddpm_hf import LinearNoiseScheduler
torch.manual_seed(0)
scheduler = LinearNoiseScheduler()
scheduler.set_timesteps(50)
x, z = torch.randn(2, {images}, 3, 32, 32)
t = int(scheduler.timesteps[25])
ts = torch.arange({images})
"""
BATCH = """
import torch
try:
    from ddpm_hf.data.dataset import ImageData
except ImportError:
    from ddpm_hf.data import ImageData
images = ImageData(torch.randint(0, 256, (10000, 3, 32, 32), dtype=torch.uint8))
indices = torch.randint(0, 10000, (64,))
"""
NETWORK = """
import torch
from ddpm_hf import DDPMUNet
torch.set_grad_enabled(False)
unet = DDPMUNet(sample_size=28, in_channels=1).eval()
x, t = torch.randn(1, 1, 28, 28), torch.tensor([500])
"""
CALLS = {  # what is done before, what is timed
    "scheduler.step, 1 image of 3 x 32 x 32": (SCHEDULER.format(images=1), "scheduler.step(z, t, x)"),
    "scheduler.step, 64 images": (SCHEDULER.format(images=64), "scheduler.step(z, t, x)"),
    "scheduler.add_noise, 64 images": (SCHEDULER.format(images=64), "scheduler.add_noise(x, z, ts)"),
    "ImageData.batch, 64 images": (BATCH, "images.batch(indices)"),
    "DDPMUNet, 1 image of 1 x 28 x 28": (NETWORK, "unet(x, t)"),
}
TIME = """
import statistics, timeit
timer = timeit.Timer({call!r}, {setup!r})
number = timer.autorange()[0]
print(statistics.median(timer.repeat(25, number)) / number)
"""


def run(package: Path, command: list[str], work: Path) -> tuple[float, float]:
    """Seconds from start to end, and peak MiB, of `python command` with the `ddpm_hf` of a checkout.

    Linux counts the memory of the process that starts another as that one's peak, so this one stays small: no torch.
    """
    environment = {**os.environ, "PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    with (work / "log").open("wb") as log:
        child = subprocess.Popen([sys.executable, *command], env=environment, cwd=work, stdout=log, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(
            f"{package}: {' '.join(command)} failed:\n{(work / 'log').read_text(encoding='utf-8')[-2000:]}"
        )
    return seconds, usage.ru_maxrss / 1024


def prepare(before: Path, work: Path) -> None:
    """What the commands need: images, an untrained network like `ddpm-cifar10`, and digits trained by `before`."""
    noise = np.random.default_rng(0)
    (work / "images").mkdir()
    for k in range(256):
        Image.fromarray(noise.integers(0, 256, (28, 28), np.uint8)).save(work / "images" / f"{k:03}.png")
    run(before, ["-c", UNTRAINED], work)
    run(before, [*DDPM_HF, "train", "--config", "digits", "--max_train_steps", "100", "--output_dir", "digits"], work)


def jobs() -> dict[str, Callable[[str], list[str]]]:
    """By name, a command that writes into the folder it is given."""

    def train(*options: str) -> Callable[[str], list[str]]:
        return lambda out: [*DDPM_HF, "train", *options, "--output_dir", out]

    def sample(model: str, images: int, steps: int) -> Callable[[str], list[str]]:
        sizes = ("--num_images", str(images), "--num_inference_steps", str(steps), "--seed", "0")
        return lambda out: [*DDPM_HF, "sample", model, *sizes, "--output_dir", out]

    images = ("--config", "explainingai-mnist", "--train_data_dir", "images", "--train_batch_size", "16")
    few = ("--eval_batch_size", "4", "--ddpm_num_inference_steps", "5")  # samples at the end
    timed = {name: TIME.format(setup=setup, call=call) for name, (setup, call) in CALLS.items()}
    return {
        "import": lambda out: ["-c", "import ddpm_hf; ddpm_hf.DDPMCustomPipeline"],
        "help": lambda out: [*DDPM_HF, "--help"],
        "train digits, 15 updates": train("--config", "digits", "--max_train_steps", "15"),
        "train digits, 200 updates": train("--config", "digits", "--max_train_steps", "200"),
        "train explainingai-mnist, 25 updates of 16": train(*images, *few, "--max_train_steps", "25"),
        "sample digits, 16 images, 50 steps": sample("digits", 16, 50),
        "sample ddpm-cifar10, 1 image, 20 steps": sample("cifar10", 1, 20),
        "sample ddpm-cifar10, 16 images, 5 steps": sample("cifar10", 16, 5),
        **{name: (lambda out, code=code: ["-c", code]) for name, code in timed.items()},
    }


def levels(one: Path, other: Path) -> int | str:
    """Largest difference of a pixel between the PNG files of two folders; empty where there are none."""
    names = sorted(path.relative_to(one) for path in one.rglob("*.png"))
    pairs = [[np.asarray(Image.open(folder / name), np.int16) for folder in (one, other)] for name in names]
    return max((int(np.abs(a - b).max()) for a, b in pairs), default="")


def compare(name: str, command: Callable[[str], list[str]], before: Path, work: Path, rounds: int) -> dict:
    packages = {"before": before, "now": HERE}
    found = {side: [] for side in packages}
    for k in range(rounds):
        for side in sorted(packages, reverse=k % 2 == 1):
            shutil.rmtree(work / side, ignore_errors=True)
            seconds, memory = run(packages[side], command(side), work)
            if name in CALLS:
                seconds = float((work / "log").read_text(encoding="utf-8").split()[-1])
            found[side].append((seconds, memory))
    seconds, memory = ({side: [turn[what] for turn in found[side]] for side in packages} for what in (0, 1))
    ratios = [now / then for then, now in zip(seconds["before"], seconds["now"], strict=True)]
    return {
        "command": name,
        **{f"{side}_s": f"{statistics.median(seconds[side]):.4g}" for side in packages},
        **{key: round(of(ratios), 3) for key, of in (("ratio", statistics.median), ("lowest", min), ("highest", max))},
        **{f"{side}_MiB": round(statistics.median(memory[side])) for side in packages},
        "levels": levels(work / "before", work / "now") if name.startswith("sample") else "",
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="commands and calls whose name has this in it")
    args = parser.parse_args()
    before = args.checkout.resolve()
    if not (before / "ddpm_hf" / "__init__.py").is_file():
        parser.error(f"{args.checkout} is no checkout of this project: it has no ddpm_hf/__init__.py")
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    with (
        tempfile.TemporaryDirectory() as folder,
        (args.out / "before.csv").open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        prepare(before, Path(folder))
        for name, command in jobs().items():
            if args.only not in name:
                continue
            row = compare(name, command, before, Path(folder), args.rounds)
            table.writerow(row)
            file.flush()
            print(f"| {' | '.join(str(row[column]) for column in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    main()
