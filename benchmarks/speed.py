"""Ours against what people use now, in speed: `python benchmarks/speed.py OUT`.

Each contestant is a process (`speed_worker.py`, which says what they are) that waits while another one works. They take
turns, A B B A A B ..., and each round gives a ratio; told are the medians, of seconds and of ratios. Before that,
networks of the same weights must predict the same. A training step is forward, backward, clipping, optimiser and
moving average, of images that lie ready; a sampling step is the network and the scheduler's step. Writes speed.csv and
speed.png into OUT and prints a table; a number above 1 says that ours is faster (or smaller).

Ours in training and sampling has the C library keep freed memory, as `ddpm-hf train` and `ddpm-hf sample` do; rows
"same malloc" give that to the other too. The rest is compared without.

`--part floors` measures those that have a target alone, each for longer; with `--before CHECKOUT`, a clone at an
older commit, ours now against ours then takes the place of the others (a ratio below 0.97 is a miss). `--part gains`
takes each thing that makes ours fast away again, and tries what was left out. `--lucidrains PYTHON` is the
interpreter of an environment with denoising-diffusion-pytorch (`pip install --no-deps`, with torch, einops, ema-
pytorch, accelerate, scipy, tqdm and pillow); without it that row is "not run".
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

WORKER = Path(__file__).with_name("speed_worker.py")
COLUMNS = (
    "network", "work", "batch", "against", "unit", "ours", "theirs", "ratio", "lowest", "highest", "rounds", "floor"
)  # fmt: skip
TOLERANCE = 1e-5
TURN = 0.4  # seconds, of what takes less
ROUNDS, LONG = (3, 75), 25  # at least (one less where it takes so many seconds), at most
LONGER = 2.5  # times as long, of floors alone


class Contestant(NamedTuple):
    """`malloc`: with the allocator's thresholds that our training sets; `label`: in the table; `checkout`: the code."""

    name: str
    dtype: str = "fp32"
    malloc: bool = False
    variant: str | None = None
    label: str | None = None
    checkout: str | None = None

    def __str__(self):
        more = [self.dtype] * (self.dtype != "fp32") + ["same malloc"] * (self.malloc and self.name != "ours")
        return self.label or ", ".join([self.name, *more])


class Task(NamedTuple):
    """What is timed; `against`: those that `ours` is compared with; `floors`: of the ratio, in the order of them.

    `starts`: how often the processes are started anew: where memory comes to lie in a process decides how much of it is
    given back and faulted in again, so that one process of diffusers may take twice the time of another.
    """

    network: str
    work: str
    batch: int
    ours: Contestant
    against: tuple[Contestant, ...]
    floors: tuple[float | None, ...] = ()
    seconds: float = 6
    starts: int = 1


TRAINS = SAMPLES = Contestant("ours", malloc=True)  # as `ddpm-hf train` and `ddpm-hf sample` set it
OURS = Contestant("ours")  # as who imports us has it
PLAIN = OURS._replace(label="ours in a pipeline alone")
TUTORIAL, DIFFUSERS = Contestant("tutorial"), Contestant("diffusers")
ALIKE = Contestant("diffusers", malloc=True), Contestant("tutorial", malloc=True)
OURS_16, THEIRS_16 = Contestant("ours", "bf16", True, label="ours, bf16"), Contestant("diffusers", "bf16")
ALIKE_16 = Contestant("diffusers", "bf16", True)
TABLE = [
    Task("explainingai", "train", 64, TRAINS, (TUTORIAL, ALIKE[1]), (1.6,), 30),
    Task("explainingai", "train", 16, TRAINS, (TUTORIAL, ALIKE[1])),
    Task("explainingai", "train", 1, TRAINS, (TUTORIAL,), seconds=8),
    Task("explainingai", "step", 64, SAMPLES, (TUTORIAL, ALIKE[1]), (1.35,)),
    Task("explainingai", "step", 16, SAMPLES, (TUTORIAL, ALIKE[1]), seconds=12),
    Task("explainingai", "step", 1, SAMPLES, (TUTORIAL,), seconds=8),
    Task("explainingai", "sample", 1, SAMPLES, (TUTORIAL,)),
    Task("small", "train", 64, TRAINS, (DIFFUSERS,)),
    Task("small", "train", 16, TRAINS, (DIFFUSERS,), seconds=8),
    Task("small", "train", 1, TRAINS, (DIFFUSERS,), seconds=8),
    Task("small", "step", 64, SAMPLES, (DIFFUSERS,), seconds=8),
    Task("small", "step", 16, SAMPLES, (DIFFUSERS,), seconds=8),
    Task("small", "step", 1, SAMPLES, (DIFFUSERS,), seconds=8),
    Task("small", "sample", 1, SAMPLES, (DIFFUSERS,), seconds=8),
    Task("small", "sample", 16, SAMPLES, (DIFFUSERS,)),
    Task("labml", "train", 16, TRAINS, (TUTORIAL,), (1.3,), 30),
    Task("labml", "step", 16, SAMPLES, (TUTORIAL,)),
    Task("ddpm-cifar10", "train", 16, TRAINS, (DIFFUSERS, ALIKE[0]), (1.07,), 30),
    Task("ddpm-cifar10", "train", 16, OURS_16, (DIFFUSERS, THEIRS_16, ALIKE_16), (1.8, 1.07), 30),
    Task("ddpm-cifar10", "train", 64, TRAINS, (DIFFUSERS,)),
    Task("ddpm-cifar10", "train", 1, TRAINS, (DIFFUSERS,), seconds=15),
    Task("ddpm-cifar10", "step", 16, SAMPLES, (DIFFUSERS, ALIKE[0]), (1.10,), 30),
    Task("ddpm-cifar10", "step", 16, PLAIN, (DIFFUSERS,)),
    Task("ddpm-cifar10", "step", 64, SAMPLES, (DIFFUSERS,), seconds=18),
    Task("ddpm-cifar10", "step", 1, SAMPLES, (DIFFUSERS,), seconds=12),
    Task("ddpm-cifar10", "step", 16, OURS_16, (THEIRS_16, ALIKE_16), seconds=12),
    Task("ddpm-cifar10", "sample", 1, SAMPLES, (DIFFUSERS,), seconds=10),
    Task("script", "train", 16, TRAINS, (DIFFUSERS,)),
    Task("script", "train", 1, TRAINS, (DIFFUSERS,)),
    Task("script", "step", 16, SAMPLES, (DIFFUSERS,), seconds=10),
    Task("script", "step", 1, SAMPLES, (DIFFUSERS,), seconds=8),
    Task("script", "sample", 1, SAMPLES, (DIFFUSERS,), seconds=10),
    Task("ddpm-cifar10", "train", 16, TRAINS, (Contestant("lucidrains", label="lucidrains, network of its own"),)),
    Task("ddpm-cifar10", "step", 16, SAMPLES, (Contestant("lucidrains", label="lucidrains, network of its own"),)),
    Task("", "scheduler step", 1, OURS, (DIFFUSERS,), (4,), 10, starts=5),
    Task("", "scheduler step", 64, OURS, (DIFFUSERS,), (1.6,), 24, starts=12),
    Task("", "scheduler step", 64, SAMPLES, (ALIKE[0],), seconds=9, starts=3),
    Task("", "add_noise", 1, OURS, (DIFFUSERS,), seconds=5),
    Task("", "add_noise", 64, OURS, (DIFFUSERS,), seconds=5),
    Task("ddpm-cifar10", "EMA", 1, OURS, (DIFFUSERS, Contestant("diffusers, foreach")), (2.3,), 10),
    Task("", "data", 64, OURS, (DIFFUSERS,), (20,), 8),
]  # fmt: skip
AWAY = {
    "train": ("attention of the tutorials", "pixels doubled, then convolved", "AdamW as torch has it by default",
              "diffusers' moving average"),
    "step": ("attention of the tutorials", "pixels doubled, then convolved"),
}  # fmt: skip
FOR_MEMORY = ("gradient checkpointing", "batch in four parts")
LEFT_OUT = {
    "train": (
        "channels innermost",
        "channels innermost, of weights too",
        "one product for all time projections",
        *FOR_MEMORY,
    ),
    "step": ("channels innermost", "channels innermost, of weights too", "one product for all time projections"),
}
MEMORY_OF = {"train": "MiB of training", "sample": "MiB of sampling"}
MEMORY_FLOOR = 0.4  # of the tutorial's, explainingai at 64


def gains(compiled: bool) -> list[Task]:
    tasks = []
    for network, batches in (("explainingai", (16,)), ("ddpm-cifar10", (1, 16)), ("small", (16,))):
        for what in ("train", "step"):
            for batch in batches if what == "step" else (16,):
                ours = Contestant("ours", malloc=True)
                variants = [*AWAY[what], *LEFT_OUT[what]]
                variants += ["torch.compile"] * (compiled and network == "small")  # others take many minutes
                if network != "ddpm-cifar10":
                    variants.remove("attention of the tutorials") if network == "small" else None
                    variants = [v for v in variants if v != "pixels doubled, then convolved" or network == "small"]
                others = [Contestant("ours", malloc=True, variant=v, label=v) for v in variants]
                others.append(Contestant("ours", label="malloc as it is"))
                seconds = 6 if network == "small" else 18
                for k in range(0, len(others), 3):  # more at once take more memory than there may be
                    tasks.append(Task(network, what, batch, ours, tuple(others[k : k + 3]), seconds=seconds))
    return tasks


# ---------------------------------------------------------------- the workers


class Worker:
    """The process of a contestant with one network."""

    def __init__(self, contestant: Contestant, python: str):
        self.contestant, checkout = contestant, contestant.checkout
        script = Path(checkout, "benchmarks", WORKER.name) if checkout else WORKER
        environment = os.environ | {"PYTHONPATH": checkout or str(WORKER.parents[1])}
        pipe, silent = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(
            [python, str(script)], stdin=pipe, stdout=pipe, stderr=silent, encoding="utf-8", env=environment
        )

    def tell(self, **message) -> None:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def reply(self) -> dict:
        line = self.process.stdout.readline()
        reply = json.loads(line) if line else {"error": f"ended with {self.process.wait()}"}
        if "error" in reply:
            raise RuntimeError(f"{self.contestant}: {reply['error']}")
        return reply

    def ask(self, **message) -> dict:
        self.tell(**message)
        return self.reply()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def measure(task: Task, python_of: dict[str, str], quick: bool) -> list[dict]:
    """A row for each that ours is compared with."""
    seconds, peaks = [], []
    for _ in range(1 if quick else task.starts):
        taken, peaks = measure_once(task, python_of, quick)
        seconds += taken
    rows = []
    for k, against in enumerate(task.against, 1):
        ratios = [s[k] / s[0] for s in seconds]
        floor = task.floors[k - 1] if k <= len(task.floors) else None
        rows.append({
            "network": task.network, "work": task.work, "batch": task.batch,
            "against": f"{task.ours.label or 'ours'} : {against}" if task.ours.label else str(against),
            "ours": 1000 * statistics.median(s[0] for s in seconds),
            "theirs": 1000 * statistics.median(s[k] for s in seconds), "unit": "ms",
            "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "rounds": len(seconds),
            "floor": floor, "our_mib": peaks[0], "their_mib": peaks[k],
        })  # fmt: skip
    return rows


def measure_once(task: Task, python_of: dict[str, str], quick: bool) -> tuple[list[list[float]], list[int]]:
    """Seconds of each contestant in each round, and the MiB that each took at most."""
    contestants = [task.ours, *task.against]
    workers = [Worker(c, python_of[c.name.split(",")[0]]) for c in contestants]
    try:
        for worker in workers:  # at the same time: nothing is computed yet
            of, network = worker.contestant, "lucidrains" if worker.contestant.name == "lucidrains" else task.network
            worker.tell(do="make", contestant=of.name, name=network, what=task.work, batch=task.batch,
                        dtype=of.dtype, variant=of.variant, malloc=of.malloc)  # fmt: skip
        for worker in workers:
            worker.reply()
        first = [worker.ask(do="run", times=1, warm=False)["seconds"] for worker in workers]
        if max(first) < 1:
            first = [worker.ask(do="run", times=5, warm=False)["seconds"] for worker in workers]
        times = [max(1, round(TURN / each)) for each in first]
        warm = max(times) > 1
        enough = ROUNDS[0] if sum(first) < LONG else ROUNDS[0] - 1
        seconds, began = [], time.monotonic()
        long = task.seconds / task.starts
        while len(seconds) < ROUNDS[1] and (len(seconds) < enough or time.monotonic() - began < long):
            turn = list(enumerate(workers))
            turn = turn[:: -1 if len(seconds) % 2 else 1]
            taken = {k: w.ask(do="run", times=times[k], warm=warm)["seconds"] for k, w in turn}
            seconds.append([taken[k] for k in range(len(workers))])
            if quick:
                break
        peaks = [worker.ask(do="peak")["peak"] for worker in workers]
    finally:
        for worker in workers:
            worker.__exit__()
    return seconds, peaks


def memory_row(row: dict) -> dict:
    floor = (
        1 / MEMORY_FLOOR if (row["network"], row["batch"], row["against"]) == ("explainingai", 64, "tutorial") else None
    )
    ratio = row["their_mib"] / row["our_mib"]
    return {**row, "work": MEMORY_OF[row["work"]], "ours": row["our_mib"], "theirs": row["their_mib"],
            "unit": "MiB", "ratio": ratio, "lowest": ratio, "highest": ratio, "rounds": 1, "floor": floor}  # fmt: skip


def imports(quick: bool) -> list[dict]:
    """Seconds of Python with an import alone, in turns."""
    what = {"ours": "import ddpm_hf", "diffusers": "from diffusers import UNet2DModel, DDPMScheduler, DDPMPipeline"}
    seconds = defaultdict(list)
    for _ in range(1 if quick else 5):
        for name, statement in what.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True, stderr=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    ours, theirs = (1000 * statistics.median(s) for s in seconds.values())
    return [{"network": "", "work": "import", "batch": 1, "against": "diffusers", "unit": "ms", "ours": ours,
             "theirs": theirs, "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
             "rounds": len(ratios), "floor": None}]  # fmt: skip


def check_outputs(python: str) -> list[str]:
    """Networks of the same weights predict the same."""
    lines, pairs = [], [("explainingai", TUTORIAL), ("labml", TUTORIAL), ("small", DIFFUSERS),
                        ("ddpm-cifar10", DIFFUSERS), ("script", DIFFUSERS)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for network, other in pairs:
            paths = [f"{folder}/{network}-{name}.pt" for name in ("ours", "other")]
            for contestant, path in zip((SAMPLES, other), paths, strict=True):  # threads of two would be in the way
                with Worker(contestant, python) as worker:
                    worker.ask(do="output", contestant=contestant.name, name=network, path=path)
            outputs = [torch.load(path) for path in paths]
            apart = (outputs[0] - outputs[1]).abs().max().item()
            lines.append(f"{network}: predictions of ours and {other} are at most {apart:.1e} apart")
            if not apart < TOLERANCE:
                raise SystemExit(f"{lines[-1]}; it must be less than {TOLERANCE:g}")
    return lines


# ---------------------------------------------------------------- what is told


def machine() -> str:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if "model name" in line
    ]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU (CUDA: not measured)"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads{gpu}, {versions}"


def told(row: dict) -> str:
    """As a row of Markdown."""
    ratio = f"{row['ratio']:.3g} ({row['lowest']:.3g} ... {row['highest']:.3g})"
    held = "held" if row["ratio"] >= (row["floor"] or 0) else "MISSED"
    floor = f"{row['floor']:.3g} {held}" if row["floor"] else ""
    cells = [row[c] for c in ("network", "work", "batch", "against")]
    cells += [f"{row[whose]:.4g} {row['unit']}" for whose in ("ours", "theirs")] + [ratio, row["rounds"], floor]
    return f"| {' | '.join(map(str, cells))} |"


def write(rows: list[dict], path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def draw(rows: list[dict], path: Path) -> None:
    rows = [row for row in rows if row["ratio"]]
    figure = Figure(figsize=(9, 0.24 * len(rows) + 1.2), layout="constrained")
    axes, places = figure.add_subplot(), range(len(rows), 0, -1)
    axes.barh(places, [row["ratio"] - 1 for row in rows], left=1, color="tab:blue", height=0.7)
    for place, row in zip(places, rows, strict=True):
        axes.plot([row["lowest"], row["highest"]], [place] * 2, color="black", linewidth=0.8)
        if row["floor"]:
            axes.plot([row["floor"]] * 2, [place - 0.42, place + 0.42], color="tab:red", linewidth=2)
    labels = [f"{row['network']} {row['work']} {row['batch']} : {row['against']}".strip() for row in rows]
    axes.set_yticks(list(places), labels, fontsize=7)
    axes.set_ylim(0.3, len(rows) + 0.7)
    axes.set_xscale("log")
    ticks = [0.5, 1, 1.5, 2, 3, 5, 10, 20, 50]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times as fast (or small) as the other; line: all rounds; red: the floor")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=("table", "floors", "gains"), default="table")
    parser.add_argument("--before", metavar="CHECKOUT", help="of the floors: compare with ours at an older commit")
    parser.add_argument("--lucidrains", metavar="PYTHON")
    parser.add_argument(
        "--compiled", action="store_true", help="of the gains: torch.compile too, of the network `small`"
    )
    parser.add_argument("--only", help="tasks whose line holds this")
    parser.add_argument("--quick", action="store_true", help="one round of each, to see that all work")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    began, this = time.monotonic(), sys.executable
    python_of = {"ours": this, "diffusers": this, "tutorial": this, "lucidrains": args.lucidrains}
    print(machine(), flush=True)
    if args.part != "gains" and not args.only:
        print("\n".join(check_outputs(this)), flush=True)
    print("\n| network | work | batch | against | ours | theirs | ratio (all rounds) | rounds | floor |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    rows, name = [], {"table": "speed"}.get(args.part, args.part)
    tasks = gains(args.compiled) if args.part == "gains" else TABLE
    if args.part == "floors":
        tasks = [task._replace(against=task.against[: len(task.floors)], seconds=LONGER * task.seconds)
                 for task in TABLE if any(task.floors)]  # fmt: skip
    if args.before:
        name, checkout = "before-floors", str(Path(args.before).resolve())
        tasks = [task._replace(against=(task.ours._replace(label="ours before", checkout=checkout),), floors=(0.97,))
                 for task in tasks]  # fmt: skip
    for task in tasks:
        line = f"{task.network} {task.work} {task.batch} {', '.join(map(str, task.against))}"
        if args.only and args.only not in line:
            continue
        missing = [c for c in task.against if python_of.get(c.name.split(",")[0]) is None]
        if missing:
            print(f"| {task.network} | {task.work} | {task.batch} | {missing[0]} | not run | | | | |", flush=True)
            continue
        found = measure(task, python_of, args.quick)
        for_memory = FOR_MEMORY if args.part == "gains" else {row["against"] for row in found}
        found += [memory_row(row) for row in found if task.work in MEMORY_OF and row["against"] in for_memory]
        rows += found
        print("\n".join(map(told, found)), flush=True)
        write(rows, args.out / f"{name}.csv")
    if args.part == "table" and not args.only:
        rows += imports(args.quick)
        print(told(rows[-1]))
        write(rows, args.out / f"{name}.csv")
    draw(rows, args.out / f"{name}.png")
    missed = [row for row in rows if row["floor"] and row["ratio"] < row["floor"]]
    print(f"\n{time.monotonic() - began:.0f} s; floors missed: {len(missed)} of {sum(bool(r['floor']) for r in rows)}")


if __name__ == "__main__":
    main()
