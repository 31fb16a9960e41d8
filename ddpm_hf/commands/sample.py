"""Generate images with a model into a folder, or compare solvers in one picture."""

import argparse
import os
from pathlib import Path

from ddpm_hf.commands.device import add_device
from ddpm_hf.commands.parsing import add_setting

OLD_FLAGS = {"--output": "--output_dir"}
FOR_FOLDER = ("num_images", "batch_size", "scheduler", "num_inference_steps", "format", "scale", "no_grid")
FEW = 16  # images by default; of a class-conditional model two of each class
MOST = 64  # images by default, of however many classes
FOR_COMPARISON = ("solvers", "steps")


def add_arguments(parser) -> None:
    from ddpm_hf.commands.sample_folder import FORMATS
    from ddpm_hf.schedulers.solvers import EVERY_SOLVER

    solvers = ", ".join(EVERY_SOLVER)
    parser.add_argument("model", help="a pipeline folder, or user/model on the Hub")
    both = parser.add_argument_group("sampling")
    add_setting(
        both, "--output_dir", "samples in the model's folder", help="folder to write to; existing samples are kept"
    )
    both.add_argument("--seed", type=int, default=0, help="image k depends only on the seed and k")
    both.add_argument(
        "--class_labels", nargs="+", help="names or indices of classes, which the images take in turn; default: all"
    )
    both.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance; 1 disables it")
    add_device(both)
    folder = parser.add_argument_group("folder of images")
    add_setting(folder, "--num_images", "16, or 2 of each class", type=int, help="images in the folder at the end")
    add_setting(folder, "--batch_size", 64, type=int, help="images per batch; it does not change the images")
    add_setting(folder, "--scheduler", "the model's own", help=f"solver: {solvers}")
    add_setting(folder, "--num_inference_steps", "all training timesteps", type=int, help="sampling steps")
    add_setting(folder, "--format", "png, or npy if png can't hold them", help=f"file format: {', '.join(FORMATS)}")
    add_setting(folder, "--scale", "60 pixels or more", type=int, help="how many times grid.png enlarges an image")
    folder.add_argument(
        "--no_grid", action="store_true", default=argparse.SUPPRESS,
        help="do not draw grid.png, for programs that read every image of a folder",
    )  # fmt: skip
    comparison = parser.add_argument_group("comparison of solvers")
    comparison.add_argument(
        "--compare", action="store_true", help="write compare.png: a row per solver, a column per number of steps"
    )
    add_setting(comparison, "--solvers", "all", nargs="+", help=f"rows: {solvers}")
    add_setting(comparison, "--steps", "5 10 20 50", nargs="+", type=int, help="columns: numbers of sampling steps")


def run(args) -> None:
    from ddpm_hf.pipelines.pipeline import load_pipeline, num_classes
    from ddpm_hf.utils.devices import choose_device
    from ddpm_hf.utils.memory import keep_freed_memory

    for name in FOR_FOLDER if args.compare else FOR_COMPARISON:
        if hasattr(args, name):
            raise ValueError(f"--{name} {'cannot be combined with' if args.compare else 'requires'} --compare")
    keep_freed_memory()
    device = choose_device(getattr(args, "device", None))
    pipeline = load_pipeline(args.model, "model").to(device)
    pipeline.set_progress_bar_config(leave=False, desc="steps", disable=os.environ.get("RANK", "0") != "0")
    names = pipeline.unet.config.get("class_names") or []
    labels = args.class_labels and [int(x) if x.isdecimal() and x not in names else x for x in args.class_labels]
    labels = labels or names or list(range(num_classes(pipeline.unet) or 0)) or None
    output = Path(args.output_dir) if hasattr(args, "output_dir") else _folder_of(args.model)
    (_compare if args.compare else _fill)(pipeline, labels, output, args)


def _folder_of(model: str) -> Path:
    """The folder for samples of a model: in its own folder, or in one that is named as its repository on the Hub."""
    return Path(model if os.path.isdir(model) else model.rsplit("/", 1)[-1]) / "samples"


def _fill(pipeline, labels: list | None, output: Path, args) -> None:
    from ddpm_hf.commands.sample_folder import draw_grid, sample_to_folder
    from ddpm_hf.utils.arguments import check, integer, optional

    given = {name: getattr(args, name) for name in FOR_FOLDER if hasattr(args, name)}
    scale, draws = given.pop("scale", None), not given.pop("no_grid", False)
    check("scale", scale, optional(integer(1, 100, "larger than any screen")))
    classes = len(labels) if labels else 0
    number = {"num_images": min(max(FEW, 2 * classes), MOST)}
    settings = number | {"seed": args.seed, "guidance_scale": args.guidance_scale} | given
    made = sample_to_folder(pipeline, output, class_labels=labels, **settings)
    print(f"{made} images generated -> {output}", flush=True)
    if draws and os.environ.get("RANK", "0") == "0":
        print(draw_grid(output, pipeline.unet.config, scale), flush=True)


def _compare(pipeline, labels: list | None, output: Path, args) -> None:
    from ddpm_hf.commands.sample_comparison import compare_solvers
    from ddpm_hf.commands.sample_folder import COMPARISON
    from ddpm_hf.schedulers.solvers import scheduler_class
    from ddpm_hf.utils.files import save_picture

    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir={str(output)!r} is a file; it must be a folder or not exist yet")
    settings = {"seed": args.seed, "guidance_scale": args.guidance_scale}
    if labels:
        settings["class_labels"] = [labels[k % len(labels)] for k in range(4)]
    solvers = getattr(args, "solvers", list(scheduler_class(pipeline.scheduler.config).solvers))
    steps = getattr(args, "steps", [5, 10, 20, 50])
    picture = compare_solvers(pipeline, solvers, steps, **settings)
    output.mkdir(parents=True, exist_ok=True)
    save_picture(picture, output / COMPARISON)
    print(output / COMPARISON)
