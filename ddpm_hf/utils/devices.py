"""The device that a command computes on."""

import os

import torch


def choose_device(name: str | None = None) -> torch.device:
    """The device `name`, or the fastest one of this machine: its accelerator (CUDA, MPS ...), or else the CPU.

    Under a launcher, each process has the accelerator of its `LOCAL_RANK`.

    Raises:
        ValueError: PyTorch finds no such device on this machine.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = ["cpu"] if accelerator is None else [accelerator.type, "cpu"]
    if name is None:
        name = "cpu" if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes") else found[0]
    if name not in found:
        raise ValueError(
            f"device={name!r} is no device that PyTorch finds on this machine; choose {' or '.join(found)}"
        )
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
