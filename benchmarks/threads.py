"""Waiting threads of OpenMP that sleep against those that spin: `python benchmarks/threads.py OUT`.

By default, an OpenMP thread that waits for the others of its process spins. On cores that other programs use too, it
takes the time that those need for which it waits; with `OMP_WAIT_POLICY=PASSIVE` in the environment it sleeps. The two
take turns, A B B A A B ..., each turn a new process, because the library reads the variable once; first on the machine
as it is, then beside a process that keeps each core busy. Writes threads.csv into OUT and prints a table; a ratio above
1 says that sleeping is faster.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

POLICIES = ("spinning", "sleeping")
WORKS = [("digits", "train", 64), ("ddpm-cifar10", "train", 4), ("digits", "sample", 1), ("digits", "sample", 16),
         ("ddpm-cifar10", "sample", 1), ("ddpm-cifar10", "sample", 16)]  # fmt: skip


def work(network: str, kind: str, batch: int, seconds: float) -> None:
    """Print the mean seconds of a training step or of a sampling step; runs in a process of its own."""
    import torch
    from speed_worker import NETWORKS, our_network

    from ddpm_hf import LinearNoiseScheduler
    from ddpm_hf.utils.memory import tune_process

    tune_process()
    unet, scheduler = our_network(network), LinearNoiseScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    images = torch.randn(batch, *NETWORKS[network][1])

    def train():
        t = torch.randint(len(scheduler), (batch,))
        noise = torch.randn_like(images)
        loss = (unet(scheduler.add_noise(images, noise, t), t).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def sample():
        t = torch.tensor(500)
        scheduler.step(unet(images, t).sample, t, images)

    do = {"train": train, "sample": sample}[kind]
    do()
    taken, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds or len(taken) < 2:
        start = time.perf_counter()
        do()
        taken.append(time.perf_counter() - start)
    print(statistics.mean(taken))


def measure(of: tuple, busy: bool, rounds: int, turn: float) -> dict:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() * busy)]
    plain = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environments = {"spinning": plain, "sleeping": plain | {"OMP_WAIT_POLICY": "PASSIVE"}}
    command = [sys.executable, __file__, "--work", *map(str, of), str(turn)]
    taken = {policy: [] for policy in POLICIES}
    try:
        for k in range(rounds):
            for policy in POLICIES[:: -1 if k % 2 else 1]:
                done = subprocess.run(command, env=environments[policy], check=True, stdout=subprocess.PIPE)
                taken[policy].append(1000 * float(done.stdout))
    finally:
        for other in others:
            other.kill()
            other.wait()
    ratios = [spinning / sleeping for spinning, sleeping in zip(*taken.values(), strict=True)]
    row = dict(zip(("network", "work", "batch"), of, strict=True)) | {"cores": "busy" if busy else "idle"}
    row |= {f"{policy}_ms": statistics.median(times) for policy, times in taken.items()}
    return row | {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn", type=float, default=2, help="seconds of a turn")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| network | work | batch | cores | spinning | sleeping | ratio (all rounds) |\n" + "|---" * 7 + "|")
    with open(args.out / "threads.csv", "w", newline="", encoding="utf-8") as file:
        writer = None
        for busy in (False, True):
            for of in WORKS:
                row = measure(of, busy, args.rounds, args.turn)
                times = f"{row['spinning_ms']:.3g} ms | {row['sleeping_ms']:.3g} ms"
                ratio = f"{row['ratio']:.2f} ({row['lowest']:.2f} ... {row['highest']:.2f})"
                print(f"| {' | '.join(map(str, of))} | {row['cores']} | {times} | {ratio} |", flush=True)
                if not writer:
                    writer = csv.DictWriter(file, list(row), lineterminator="\n")
                    writer.writeheader()
                writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
                file.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:4], int(sys.argv[4]), float(sys.argv[5]))
    else:
        main()
