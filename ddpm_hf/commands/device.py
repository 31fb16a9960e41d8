"""The flag --device of the commands that compute."""

import argparse


def add_device(group) -> None:
    help = "cpu, cuda or mps (default: the accelerator of this machine, or else the CPU)"
    group.add_argument("--device", default=argparse.SUPPRESS, help=help)


def pop_device(args: argparse.Namespace) -> None:
    """Take the flag out of `args`, and let Accelerate, on which training and evaluation run, use that device.

    Without the flag Accelerate chooses the accelerator of the machine itself.

    Raises:
        ValueError: PyTorch finds no such device on this machine.
    """
    from accelerate import PartialState

    from ddpm_hf.utils.devices import choose_device

    name = vars(args).pop("device", None)
    if name is not None:
        PartialState(cpu=choose_device(name).type == "cpu")
