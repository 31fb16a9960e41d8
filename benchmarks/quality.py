"""How fast samples become good, ours beside diffusers' training script: `python benchmarks/quality.py OUT digits`.

The recipes `digits` and `digits-flow`, or `mnist` and `mnist-flow` (`python benchmarks/quality.py OUT mnist --seconds
600 --seeds 0`, which needs DDPM_HF_SHARED, a folder with data/mnist/{train,test}.parquet and data/features/mnist),
against `UNet2DModel`, trained as diffusers' train_unconditional.py trains it: with that script's defaults, and with the
settings that our recipe had before v prediction and Muon (speedrun/*-former.yaml), which tells network and loop from
settings. All have the same images, seconds and, within 10 %, parameters.

In favour of diffusers: its moving average is on; images are ready tensors in memory, without a loader; a layer a block,
as ours has, not the script's two, since at equal parameters an update then takes about a fifth less time; and the
cosine of its learning rate ends with the budget, by the clock.

Each contestant is a process of one thread, and those of a seed run at the same time, so that what else the machine does
hits them alike. The clock of each is the time that it computes (CPU time), from its first update on: on a core of its
own those would be its seconds, and on a shared machine waiting is not counted. At some seconds the averaged weights are
kept, off the clock. In the end 1,000 images of each are sampled alike (20 steps of DDIM, or of Euler for flow matching,
from the same noise) and compared with training images, the first 10,000 of them where there are more. A run that is in
OUT is not done again. Writes quality-*.csv, a picture of the curves and the last samples of each, and prints what it
shows.
"""

import argparse
import contextlib
import csv
import functools
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ddpm_hf
from ddpm_hf import DDPMCustomPipeline, DDPMUNet, FlowMatchScheduler
from ddpm_hf.data.dataset import load_images
from ddpm_hf.evaluation.features.choose import make_extractor
from ddpm_hf.evaluation.features.stats import measure, unit_batches
from ddpm_hf.evaluation.metrics.fidelity import frechet_estimate, kernel_distance
from ddpm_hf.training import TrainCallback, train
from ddpm_hf.training.config import TrainConfig, load_recipe, resolve
from ddpm_hf.utils.memory import keep_freed_memory
from ddpm_hf.utils.pictures import grid
from ddpm_hf.utils.seeds import image_generators

THEIRS, MIXED = "diffusers", "diffusers, our former settings"
CONTESTANTS = {task: (task, f"{task}-flow", THEIRS, MIXED) for task in ("digits", "mnist")}  # recipes, and theirs
FORMER = Path(__file__).parent / "speedrun"
TARGETS = {"digits": 0.6, "digits-flow": 0.4, "mnist": 0.6, "mnist-flow": 0.4}  # of the seconds of the other
SIZE, WIDTHS = {"digits": 8, "mnist": 28}, {"digits": (32, 48), "mnist": (32, 48, 96)}
MARKS = {  # of the budget; samples of 28x28 take their time
    "digits": (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1),
    "mnist": (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1),
}
STEPS, REFERENCE, BATCH = 20, 10_000, 100
DISTANCES = {"frechet": "Fréchet distance", "kid": "KID"}


# ---------------------------------------------------------------- the clock


class Clock:
    """Seconds in which this process has computed since `start`; what it waits, for a core or asleep, is not counted."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        self.began = time.process_time()

    def __call__(self) -> float:
        return time.process_time() - self.began

    @contextlib.contextmanager
    def stopped(self):
        """Around what is no part of the time."""
        before = time.process_time()
        yield
        self.began += time.process_time() - before


class BudgetSpent(Exception):  # noqa: N818
    pass


class Record:
    """Keeps the averaged weights of a run at set seconds."""

    def __init__(self, folder: Path, marks: list[float]):
        self.folder, self.marks, self.seconds, self.clock = folder, marks, marks[-1], Clock()
        self.update, self.now, self.kept = 0, 0.0, 0

    def start(self, network, scheduler) -> None:
        network.save_config(self.folder / "unet")
        scheduler.save_config(self.folder / "scheduler")
        self.clock.start()

    def __call__(self, update: int, state) -> None:
        """After an update; `state` gives the averaged weights."""
        self.update, self.now = update, self.clock()
        if self.now >= self.marks[0]:
            self.marks = [mark for mark in self.marks if mark > self.now]
            with self.clock.stopped():
                self.keep(state)
        if not self.marks:
            raise BudgetSpent

    def keep(self, state) -> None:
        if self.kept < self.update:
            tensors = {name: value.contiguous().clone() for name, value in state().items()}
            told = {"update": str(self.update), "seconds": f"{self.now:.2f}"}
            save_file(tensors, self.folder / f"{self.update:06d}.safetensors", told)
            self.kept = self.update


# ---------------------------------------------------------------- the contestants


def our_config(recipe: str, seed: int, folder: Path) -> TrainConfig:
    data = {"train_data_dir": str(shared() / "data/mnist")} if "mnist" in Path(recipe).stem else {}
    return resolve({"config": recipe, "seed": seed, "output_dir": str(folder / "run"), "overwrite_output_dir": True,
                    "checkpointing_steps": 10**9, **data})  # fmt: skip


def shared() -> Path:
    return Path(os.environ["DDPM_HF_SHARED"])


def train_ours(config: TrainConfig, record: Record, ready: Callable) -> None:
    class Recorder(TrainCallback):
        def on_init_end(self, run):
            ready()
            record.start(run.unet, run.pipeline.scheduler)

        def on_step_end(self, run):
            record(run.step, run.pipeline.unet.state_dict)

    run = train(config, [Recorder()])
    record.keep(run.pipeline.unet.state_dict)  # it has done all updates of the recipe before the budget was spent


def their_network(recipe: str) -> UNet2DModel:
    widths = WIDTHS[recipe]
    down, up = ["DownBlock2D"] * len(widths), ["UpBlock2D"] * len(widths)
    down[-1], up[0] = "AttnDownBlock2D", "AttnUpBlock2D"
    return UNet2DModel(SIZE[recipe], 1, 1, block_out_channels=widths, down_block_types=down, up_block_types=up,
                       layers_per_block=1, norm_num_groups=8)  # fmt: skip


def parameters(recipe: str) -> tuple[int, int]:
    """Of our network and of theirs."""
    ours = DDPMUNet(sample_size=SIZE[recipe], in_channels=1, **load_recipe(recipe)["unet"])
    return tuple(sum(p.numel() for p in network.parameters()) for network in (ours, their_network(recipe)))


def their_settings(name: str, config: TrainConfig) -> dict:
    """Those of train_unconditional.py, or those of our recipe."""
    if name == THEIRS:
        average = {"decay": 0.9999, "use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
        return {"batch": 16, "rate": 1e-4, "warmup": 500, "betas": (0.95, 0.999), "weight_decay": 1e-6, "noise": {},
                "average": average}  # fmt: skip
    config = our_config(str(FORMER / f"{config.config}-former.yaml"), config.seed, Path(config.output_dir))
    return {"batch": config.train_batch_size, "rate": config.learning_rate, "warmup": config.lr_warmup_steps,
            "betas": (config.adam_beta1, config.adam_beta2), "weight_decay": config.adam_weight_decay,
            "noise": config.scheduler, "average": {"decay": config.ema_max_decay}}  # fmt: skip


def their_updates(network: UNet2DModel, data: torch.Tensor, settings: dict, spent: Callable[[], float]):
    """The loop of train_unconditional.py, without an end: the averaged weights after each update.

    Args:
        data: (N, C, H, W) in [-1, 1].
        spent: gives the part of the budget that is spent. Where the script counts updates, the cosine of the learning
            rate goes by it, as nobody knows beforehand how many updates there will be.
    """
    accelerator = Accelerator()
    scheduler = DDPMScheduler(**settings["noise"])
    optimizer = torch.optim.AdamW(network.parameters(), settings["rate"], settings["betas"], 1e-8,
                                  settings["weight_decay"])  # fmt: skip
    network, optimizer = accelerator.prepare(network.train(), optimizer)
    average = EMAModel(network.parameters(), **settings["average"])
    update, warm = 0, 0.0
    while True:
        for indices in torch.randperm(len(data)).split(settings["batch"]):
            clean = data[indices]
            noise, timesteps = torch.randn_like(clean), torch.randint(len(scheduler), (len(clean),))
            if update <= settings["warmup"]:
                rate, warm = update / max(1, settings["warmup"]), spent()
            else:
                rate = 0.5 * (1 + math.cos(math.pi * min(1.0, (spent() - warm) / (1 - warm))))
            for group in optimizer.param_groups:
                group["lr"] = settings["rate"] * rate
            loss = F.mse_loss(network(scheduler.add_noise(clean, noise, timesteps), timesteps).sample, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step(network.parameters())
            update += 1
            yield average


def train_theirs(name: str, config: TrainConfig, record: Record, ready: Callable) -> None:
    images, _ = load_images(config)
    data, settings = images.batch(torch.arange(len(images))), their_settings(name, config)
    torch.manual_seed(config.seed)
    network = their_network(config.config)
    names = [key for key, _ in network.named_parameters()]
    updates = their_updates(network, data, settings, lambda: record.clock() / record.seconds)
    ready()
    record.start(network, DDPMScheduler(**settings["noise"]))
    for update, average in enumerate(updates, 1):
        record(update, lambda average=average: dict(zip(names, average.shadow_params, strict=True)))


def compete(name: str, recipe: str, seed: int, seconds: float, folder: Path, barrier) -> None:
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    record, ready = Record(folder, [seconds * mark for mark in MARKS[recipe]]), barrier.wait
    with contextlib.suppress(BudgetSpent):
        if name in (THEIRS, MIXED):
            train_theirs(name, our_config(recipe, seed, folder), record, ready)
        else:
            train_ours(our_config(name, seed, folder), record, ready)
    (folder / "done.json").write_text(
        json.dumps({"updates": record.update, "seconds": round(record.now, 1)}), encoding="utf-8"
    )


def race(jobs: list[tuple]) -> None:
    """`compete(*job, barrier)` of all at the same time."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(len(jobs), timeout=1800)
    processes = [spawn.Process(target=compete, args=(*job, barrier), daemon=True) for job in jobs]
    for process in processes:
        process.start()
    for job, process in zip(jobs, processes):
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{job}: ended with {process.exitcode}, see log.txt")


# ---------------------------------------------------------------- distances


@functools.cache
def reference(recipe: str):
    """The extractor, what it says of training images, and of 1,000 held-out ones (or of as many as there are)."""
    torch.set_num_threads(1)  # there is a process a core
    keep_freed_memory()
    extractor = make_extractor("digits" if recipe == "digits" else str(shared() / "data/features/mnist"), 1)
    train, held_out = load_images(our_config(recipe, 0, Path()))
    train.pixels, held_out.pixels = train.pixels[:REFERENCE], held_out.pixels[:1000]
    return extractor, measure(extractor, unit_batches(train)), measure(extractor, unit_batches(held_out))


def distances(features: torch.Tensor, real) -> dict:
    frechet, kid = frechet_estimate(features, real.stats), kernel_distance(features, real.features)
    found = {"frechet": frechet.value, "frechet_stderr": frechet.stderr, "kid": kid.value, "kid_stderr": kid.stderr}
    return {key: float(f"{value:.5g}") for key, value in found.items()}


def judge_real(recipe: str, n: int) -> dict:
    """The distances of held-out images; a Fréchet distance only if they are n, as its bias depends on their number."""
    _, real, held_out = reference(recipe)
    found = distances(held_out.features, real)
    print(f"{len(held_out.features)} held-out images: {found}", flush=True)
    return {key: value for key, value in found.items() if len(held_out.features) == n or not key.startswith("frechet")}


def load(name: str, path: Path) -> DDPMCustomPipeline:
    """The pipeline of a contestant with the weights in `path`."""
    unet_class = UNet2DModel if name in (THEIRS, MIXED) else DDPMUNet
    unet = unet_class.from_config(unet_class.load_config(path.parent / "unet")).eval()
    unet.load_state_dict(load_file(path))
    settings = DDPMScheduler.load_config(path.parent / "scheduler")
    scheduler_of = DDPMScheduler if name in (THEIRS, MIXED) else getattr(ddpm_hf, settings["_class_name"])
    return DDPMCustomPipeline(unet, scheduler_of.from_config(settings))


@torch.no_grad()
def judge(recipe: str, name: str, seed: int, path: Path, n: int, picture: Path | None) -> dict:
    """The row of the weights in `path`."""
    extractor, real, _ = reference(recipe)
    pipeline = load(name, path)
    pipeline.set_progress_bar_config(disable=True)
    flow = isinstance(pipeline.scheduler, FlowMatchScheduler)
    walk = {"scheduler": "euler"} if flow else {"scheduler": "ddim", "clip_sample": True}
    walk |= {"num_inference_steps": STEPS, "output_type": "pt"}
    images = []
    for numbers in torch.arange(n).split(BATCH):
        images.append(pipeline(len(numbers), image_generators(1, numbers.tolist()), **walk).images)
    images = torch.cat(images)
    if picture:
        grid(images[:64].movedim(1, -1).numpy(), 8).save(picture)
    with safe_open(path, "pt") as file:
        told = file.metadata()
    row = {"contestant": name, "seed": seed, "seconds": float(told["seconds"]), "updates": int(told["update"])}
    return row | distances(measure(extractor, images.split(BATCH)).features, real)


# ---------------------------------------------------------------- what it shows


def first_at(curve: list[tuple[float, float]], level: float) -> float | None:
    """The first second at which the distance was at most this."""
    return next((seconds for seconds, distance in curve if distance <= level), None)


def verdict(ours: list[tuple[float, float]], other: list[tuple[float, float]], target: float = 0.5) -> dict:
    """When ours was first as good as the other ever was, and whether that took at most `target` of the other's time."""
    distance, seconds = min((distance, seconds) for seconds, distance in other)
    ours_at = first_at(ours, distance)
    ratio = None if ours_at is None else ours_at / seconds
    return {
        "best": distance,
        "at": seconds,
        "ours_at": ours_at,
        "ratio": ratio,
        "met": ours_at is not None and ratio <= target,
    }


def report(rows: list[dict], names: tuple[str, ...]) -> None:
    seeds, reached, verdicts = sorted({row["seed"] for row in rows}), [], []
    for key, label in DISTANCES.items():
        for seed in seeds:
            curves = {name: [(row["seconds"], row[key]) for row in of(rows, name, seed)] for name in names}
            best = min(distance for curve in curves.values() for _, distance in curve)
            first = [told(first_at(curves[name], best)) for name in names]
            reached.append([label, seed, f"{best:.4g}", *first])
            ours = [name for name in names if name in TARGETS]
            for our, name in itertools.product(ours, [name for name in names if name not in TARGETS]):
                v = verdict(curves[our], curves[name], TARGETS[our])
                ratio = "-" if v["ratio"] is None else f"{v['ratio']:.2f}"
                row = [label, seed, name, f"{v['best']:.4g}", told(v["at"]), our, told(v["ours_at"]), ratio]
                verdicts.append([*row, f"at most {TARGETS[our]}: {'met' if v['met'] else 'missed'}"])
    table(["distance", "seed", "best of any", *(f"{name} there at" for name in names)], reached)
    table(["distance", "seed", "other", "its best", "at", "ours", "as good at", "ratio", "target"], verdicts)
    for key, label in DISTANCES.items():
        curves = []
        for name in names:
            for cells in (of(rows, name, seed) for seed in seeds):
                curve = (f"{r['seconds']:.0f}: {r[key]:.3g} ± {2 * r[f'{key}_stderr']:.2g}" for r in cells)
                curves.append([name, cells[0]["seed"], cells[-1]["updates"], "; ".join(curve)])
        table(["contestant", "seed", "updates", f"seconds: {label} ± 2 standard errors"], curves)


def table(head: list[str], rows: list[list]) -> None:
    print("", *(f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *rows)), sep="\n")


def told(seconds: float | None) -> str:
    return "not" if seconds is None else f"{seconds:.0f} s"


def of(rows: list[dict], name: str, seed: int) -> list[dict]:
    found = [row for row in rows if (row["contestant"], row["seed"]) == (name, seed)]
    return sorted(found, key=lambda row: row["seconds"])


def draw(rows: list[dict], names: tuple[str, ...], real: dict, n: int, path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, 2), DISTANCES.items()):
        for k, name in enumerate(names):
            for nth, seed in enumerate(sorted({row["seed"] for row in rows})):
                curve = [(row["seconds"], row[key], 2 * row[f"{key}_stderr"]) for row in of(rows, name, seed)]
                seconds, values, errors = zip(*curve)
                axes.plot(seconds, values, ".-", color=f"C{k}", linewidth=1, label=None if nth else name)
                low, high = ([v + sign * e for v, e in zip(values, errors)] for sign in (-1, 1))
                axes.fill_between(seconds, low, high, color=f"C{k}", alpha=0.15, linewidth=0)
        if key in real:
            axes.axhline(real[key], color="0.4", linestyle="--", linewidth=1, label="held-out images")
        linear_below = 2 * min(row["kid_stderr"] for row in rows)  # KID may be negative
        axes.set_yscale("symlog", linthresh=linear_below) if key == "kid" else axes.set_yscale("log")
        axes.set(xlabel="seconds of training on one core", ylabel=f"{label} of {n:,} samples ± 2 s.e.")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> None:
    recipe, names, out = args.recipe, CONTESTANTS[args.recipe], args.out
    ours, theirs = parameters(recipe)
    print(f"parameters: ours {ours:,}, diffusers {theirs:,}, {theirs / ours - 1:+.1%}", flush=True)
    if not 0.9 <= theirs / ours <= 1.1:
        raise ValueError("the networks differ in their parameters by more than 10 %")
    folders = {(name, seed): out / f"{recipe}-{seed}-{name.replace(', ', '-').replace(' ', '-')}"
               for seed in args.seeds for name in names}  # fmt: skip
    for seed in args.seeds:
        if not all((folders[name, seed] / "done.json").exists() for name in names):
            for name in names:
                folders[name, seed].mkdir(parents=True, exist_ok=True)
                for file in folders[name, seed].glob("*.safetensors"):
                    file.unlink()
            race([(name, recipe, seed, args.seconds, folders[name, seed]) for name in names])
        done = {name: (folders[name, seed] / "done.json").read_text(encoding="utf-8") for name in names}
        print(f"seed {seed}: ", {name: json.loads(text) for name, text in done.items()}, flush=True)
    jobs = []
    for (name, seed), folder in folders.items():
        paths = sorted(folder.glob("*.safetensors"))
        jobs += [(recipe, name, seed, path, args.n, folder / "last.png" if path == paths[-1] else None)
                 for path in paths]  # fmt: skip
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        real, rows = pool.submit(judge_real, recipe, args.n), []
        for row in pool.map(judge, *zip(*jobs)):
            rows.append(row)
            print(row, flush=True)
        baseline = real.result()
    with open(out / f"quality-{recipe}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, {"contestant": "held-out images", **baseline}])
    draw(rows, names, baseline, args.n, out / f"quality-{recipe}.png")
    report(rows, names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("recipe", choices=tuple(CONTESTANTS))
    parser.add_argument("--seconds", type=float, default=200.0, help="of training, for each contestant")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=1000, help="images of each to compare")
    main(parser.parse_args())
