"""Estimate what a training run costs before it starts: parameters, FLOPs and memory are counted, time is estimated.

Nothing is trained and no image is read. All settings of `ddpm-hf train` are understood.
"""

from ddpm_hf.commands import train
from ddpm_hf.commands.parsing import add_setting

HINTS = train.HINTS


def add_arguments(parser) -> None:
    from ddpm_hf.training.plan import DEVICES

    hardware = parser.add_argument_group("plan")
    add_setting(hardware, "--gpus", 1, type=int, help="devices that train together")
    add_setting(hardware, "--device", "h100", help=f"one of {', '.join(DEVICES)}")
    add_setting(hardware, "--num_images", "those of the recipe's data set", type=int, help="images to train on")
    train.add_arguments(parser)


def run(args) -> None:
    from ddpm_hf.training.plan import plan
    from ddpm_hf.training.recipes import for_planning

    settings = vars(args)
    of_plan = {name: settings.pop(name) for name in ("gpus", "device", "num_images") if name in settings}
    print("\n".join(plan(for_planning(settings), **of_plan)))
