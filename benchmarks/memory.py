"""Memory of training, counted by `ddpm_hf.training.plan` and measured on the CPU: `python benchmarks/memory.py`
writes memory.csv.

Measured is the growth of the process's peak (VmHWM, Linux) from before there is a network to after three updates, each
in a fresh process: once with the C library's allocator as the training loop sets it, and once with one that maps every
tensor by itself and gives it back at once, so that nothing is lost between tensors.
"""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.training.config import resolve
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.plan import at_rest, count_memory, image_shape, network
from ddpm_hf.utils.memory import keep_freed_memory

IMAGENET = str(Path(__file__).with_name("imagenet-64.yaml"))
CASES = [("digits", "no", 32), ("digits", "no", 128)]
CASES += [("explainingai-mnist", "no", 16), ("explainingai-mnist", "no", 64), ("explainingai-mnist", "bf16", 64)]
CASES += [("ddpm-cifar10", "no", 4), ("ddpm-cifar10", "no", 16), (IMAGENET, "no", 1), (IMAGENET, "no", 4)]
UPDATES = 3
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> None:
    with open(Path(__file__).with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        names = ("at_rest_mib", "counted_mib", "measured_mib", "measured_tensor_by_tensor_mib")
        rows.writerow(["config", "mixed_precision", "batch", *names])
        for config, precision, batch in CASES:
            unet, shape = _network(config)
            found = [at_rest(unet), count_memory(unet, shape, batch, precision).peak]
            for settings in ({}, GIVE_BACK):
                command = [sys.executable, __file__, json.dumps([config, precision, batch])]
                environment = os.environ | settings
                found.append(int(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout))
            row = [Path(config).stem, precision, batch, *(round(n / 2**20) for n in found)]
            rows.writerow(row)
            print(*row, *(f"{measured / found[1] - 1:+.0%}" for measured in found[2:]), flush=True)


def measure(config: str, precision: str, batch: int) -> int:
    torch.set_num_threads(1)
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        keep_freed_memory()
    fake, shape = _network(config)
    settings = {name: value for name, value in fake.config.items() if not name.startswith("_")}
    before = _status("VmRSS")
    unet = DDPMUNet(**settings).train()
    ema = EMA(unet, 0.999)
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    for step in range(UPDATES):
        x, noise, timesteps = torch.randn(batch, *shape), torch.randn(batch, *shape), torch.randint(1000, (batch,))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = unet(x, timesteps).sample
        (output.float() - noise).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(unet, step + 1)
    return _status("VmHWM") - before


def _network(config: str):
    config = resolve({"config": config})
    return network(config, image_shape(config)), image_shape(config)


def _status(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))[1])


if __name__ == "__main__":
    print(measure(*json.loads(sys.argv[1]))) if len(sys.argv) > 1 else main()
