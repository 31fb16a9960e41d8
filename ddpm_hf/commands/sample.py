"""Generate images with a model into a folder, or compare solvers in one picture."""

import os

from ddpm_hf.commands.device import add_device
from ddpm_hf.commands.parsing import add_setting

OLD_FLAGS = {"--output": "--output_dir"}
FOR_FOLDER = ("num_images", "batch_size", "scheduler", "num_inference_steps", "format")
FOR_COMPARISON = ("solvers", "steps")


def add_arguments(parser) -> None:
    from ddpm_hf.commands.sample_folder import FORMATS
    from ddpm_hf.schedulers.solvers import SOLVERS

    solvers = f"ddpm, {', '.join(SOLVERS)}"
    parser.add_argument("model", help="a pipeline folder, or user/model on the Hub")
    both = parser.add_argument_group("sampling")
    both.add_argument("--output_dir", default="samples", help="folder to write to; existing samples are kept")
    both.add_argument("--seed", type=int, default=0, help="image k depends only on the seed and k")
    both.add_argument("--class_labels", nargs="+", help="names or numbers of classes, which the images take in turn")
    both.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance; 1 disables it")
    add_device(both)
    folder = parser.add_argument_group("folder of images")
    add_setting(folder, "--num_images", 16, type=int, help="number of images in the folder at the end")
    add_setting(folder, "--batch_size", 64, type=int, help="images per batch; it does not change the images")
    add_setting(folder, "--scheduler", "the model's own", help=f"solver: {solvers}")
    add_setting(folder, "--num_inference_steps", "all training timesteps", type=int, help="sampling steps")
    add_setting(folder, "--format", "png", help=f"file format: {', '.join(FORMATS)}")
    comparison = parser.add_argument_group("comparison of solvers")
    comparison.add_argument(
        "--compare", action="store_true", help="write compare.png: a row per solver, a column per number of steps"
    )
    add_setting(comparison, "--solvers", "all", nargs="+", help=f"rows: {solvers}")
    add_setting(comparison, "--steps", "5 10 20 50", nargs="+", type=int, help="columns: numbers of sampling steps")


def run(args) -> None:
    from ddpm_hf.pipelines.pipeline import load_pipeline
    from ddpm_hf.utils.devices import choose_device
    from ddpm_hf.utils.memory import keep_freed_memory

    for name in FOR_FOLDER if args.compare else FOR_COMPARISON:
        if hasattr(args, name):
            raise ValueError(f"--{name} {'cannot be combined with' if args.compare else 'requires'} --compare")
    keep_freed_memory()
    device = choose_device(getattr(args, "device", None))
    pipeline = load_pipeline(args.model, "model").to(device)
    pipeline.set_progress_bar_config(disable=True)
    names = pipeline.unet.config.get("class_names") or []
    labels = args.class_labels and [int(x) if x.isdigit() and x not in names else x for x in args.class_labels]
    (_compare if args.compare else _fill)(pipeline, labels, args)


def _fill(pipeline, labels: list | None, args) -> None:
    from ddpm_hf.commands.sample_folder import sample_to_folder

    given = {name: getattr(args, name) for name in FOR_FOLDER if hasattr(args, name)}
    settings = {"num_images": 16, "seed": args.seed, "guidance_scale": args.guidance_scale} | given
    made = sample_to_folder(pipeline, args.output_dir, class_labels=labels, **settings)
    print(f"{made} images generated -> {args.output_dir}", flush=True)


def _compare(pipeline, labels: list | None, args) -> None:
    from ddpm_hf.commands.sample_comparison import compare_solvers
    from ddpm_hf.commands.sample_folder import COMPARISON
    from ddpm_hf.schedulers.solvers import SOLVERS
    from ddpm_hf.utils.files import save_picture

    if os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        raise ValueError(f"output_dir={args.output_dir!r} is a file; it must be a folder or not exist yet")
    settings = {"seed": args.seed, "guidance_scale": args.guidance_scale}
    if labels:
        settings["class_labels"] = [labels[k % len(labels)] for k in range(4)]
    solvers, steps = getattr(args, "solvers", ["ddpm", *SOLVERS]), getattr(args, "steps", [5, 10, 20, 50])
    picture = compare_solvers(pipeline, solvers, steps, **settings)
    os.makedirs(args.output_dir, exist_ok=True)
    path = os.path.join(args.output_dir, COMPARISON)
    save_picture(picture, path)
    print(path)
