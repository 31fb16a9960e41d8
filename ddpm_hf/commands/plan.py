"""Estimate the cost of a training run without running it: parameters, FLOPs, memory and time.

The command takes all settings of `ddpm-hf train`, and reads no images.
"""

from ddpm_hf.commands import train
from ddpm_hf.commands.parsing import add_setting

HINTS = train.HINTS


def add_arguments(parser) -> None:
    from ddpm_hf.training.plan import DEVICES

    hardware = parser.add_argument_group("plan")
    add_setting(hardware, "--gpus", 1, type=int, help="number of devices")
    add_setting(hardware, "--device", "h100", help=f"device: {', '.join(DEVICES)}")
    add_setting(hardware, "--num_images", "those of the recipe's data set", type=int, help="number of training images")
    train.add_settings(parser)


def run(args) -> None:
    from ddpm_hf.training.plan import plan
    from ddpm_hf.training.recipes import for_planning

    settings = vars(args)
    of_plan = {name: settings.pop(name) for name in ("gpus", "device", "num_images") if name in settings}
    print("\n".join(plan(for_planning(settings), **of_plan)))
