"""Generate images with a model into a folder, or compare solvers in one picture."""

import os

from ddpm_hf.commands.parsing import add_setting

OLD_FLAGS = {"--output": "--output_dir"}


def add_arguments(parser) -> None:
    from ddpm_hf.commands.sampling import FORMATS
    from ddpm_hf.schedulers.solvers import SOLVERS

    parser.add_argument("model", help="a pipeline folder, or user/model on the Hub")
    parser.add_argument("--output_dir", default="samples", help="the folder to fill; existing samples are kept")
    parser.add_argument("--seed", type=int, default=0, help="image k is a function of the seed and k")
    parser.add_argument("--class_labels", nargs="+", help="names or numbers of classes, in turns")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance; 1: none")
    folder = parser.add_argument_group("a folder of images")
    add_setting(folder, "--num_images", 16, type=int, help="how many the folder holds in the end")
    add_setting(folder, "--batch_size", 64, type=int, help="images generated at a time, which changes none of them")
    add_setting(folder, "--scheduler", "the model's own", help=f"ddpm, {', '.join(SOLVERS)}")
    add_setting(folder, "--num_inference_steps", "all timesteps of the training", type=int, help="sampling steps")
    add_setting(folder, "--format", "png", help=f"one of {', '.join(FORMATS)}")
    comparison = parser.add_argument_group("a comparison of solvers")
    comparison.add_argument(
        "--compare", action="store_true", help="write compare.png instead: a row per solver, a column per step count"
    )
    add_setting(comparison, "--solvers", "all", nargs="+", help=f"of ddpm, {', '.join(SOLVERS)}")
    add_setting(comparison, "--steps", "5 10 20 50", nargs="+", type=int, help="numbers of sampling steps")


def run(args) -> None:
    import torch

    from ddpm_hf.pipelines.pipeline import load_pipeline
    from ddpm_hf.utils.memory import keep_freed_memory

    of_folder = ("num_images", "batch_size", "scheduler", "num_inference_steps", "format")
    for name in of_folder if args.compare else ("solvers", "steps"):
        if hasattr(args, name):
            raise ValueError(f"--{name} is {'not ' if args.compare else ''}for --compare")
    keep_freed_memory()
    pipeline = load_pipeline(args.model, "model")
    pipeline.set_progress_bar_config(leave=False, disable=True)
    if torch.cuda.is_available():
        pipeline.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    names = pipeline.unet.config.get("class_names") or []
    labels = args.class_labels and [int(x) if x.isdigit() and x not in names else x for x in args.class_labels]
    if args.compare:
        _compare(pipeline, labels, args)
    else:
        _fill(pipeline, labels, args, {name: getattr(args, name) for name in of_folder if hasattr(args, name)})


def _fill(pipeline, labels: list | None, args, given: dict) -> None:
    from ddpm_hf.commands.sampling import sample_to_folder

    settings = {"num_images": 16, "seed": args.seed, "guidance_scale": args.guidance_scale} | given
    made = sample_to_folder(pipeline, args.output_dir, class_labels=labels, **settings)
    print(f"{made} images made -> {args.output_dir}", flush=True)


def _compare(pipeline, labels: list | None, args) -> None:
    from ddpm_hf.commands.sampling import COMPARISON, compare_solvers
    from ddpm_hf.schedulers.solvers import SOLVERS
    from ddpm_hf.utils.files import save_picture

    if os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        raise ValueError(f"output_dir={args.output_dir!r} is a file; it must be a folder or not be there yet")
    settings = {"seed": args.seed, "guidance_scale": args.guidance_scale}
    if labels:
        settings["class_labels"] = [labels[k % len(labels)] for k in range(4)]
    solvers, steps = getattr(args, "solvers", ["ddpm", *SOLVERS]), getattr(args, "steps", [5, 10, 20, 50])
    picture = compare_solvers(pipeline, solvers, steps, **settings)
    os.makedirs(args.output_dir, exist_ok=True)
    path = os.path.join(args.output_dir, COMPARISON)
    save_picture(picture, path)
    print(path)
