"""The command `ddpm-hf`. Thin: each subcommand parses its words and calls what does the work."""

import argparse
import os
import sys

import torch
from safetensors import SafetensorError

import ddpm_hf
from ddpm_hf.allocator import is_out_of_memory
from ddpm_hf.files import save_picture


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done; 2 something can't be done, with one line on stderr that says what; 143 and 130: stopped by
    SIGTERM and Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(prog="ddpm-hf", description=ddpm_hf.__doc__)
    parser.add_argument("--version", action="version", version=f"ddpm-hf {ddpm_hf.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sample", help="make images with a model, or compare solvers", add_help=False)
    commands.add_parser("train", help="train a model; `ddpm-hf train --help` lists the settings", add_help=False)
    commands.add_parser("evaluate", help="tell how good a model is, with a report", add_help=False)
    commands.add_parser("push", help="upload a model to the Hub, with its card", add_help=False)
    commands.add_parser(
        "convert", help="a tutorial's or diffusers' checkpoint as a pipeline of ours, or back", add_help=False
    )
    commands.add_parser("demo", help="a page to try a model in the browser", add_help=False)
    commands.add_parser("plan", help="what a training run will cost, before it is begun", add_help=False)
    commands.add_parser("recipes", help="list the recipes of `ddpm-hf train --config`", add_help=False)
    try:
        command = parser.parse_args(argv[:1]).command
        run = {"train": train, "sample": sample, "evaluate": evaluate, "push": push, "convert": convert}
        return (run | {"demo": demo, "plan": plan, "recipes": recipes})[command](argv[1:])
    except KeyboardInterrupt as stopped:
        print(f"ddpm-hf: {str(stopped) or 'stopped by SIGINT'}", file=sys.stderr)
        return getattr(stopped, "status", 130)
    except Exception as error:
        if not _is_explained(error):
            raise
        if os.environ.get("RANK", "0") == "0" or getattr(error, "of_each_process", False):  # else of several one speaks
            print(f"ddpm-hf: error: {_in_one_line(error)}", file=sys.stderr)
        return 2


def _is_explained(error: BaseException) -> bool:
    """Whether an error is of what was asked for or of the machine, and its message says so; else it is a fault of ours,
    and the traceback is wanted."""
    kinds = (ValueError, FloatingPointError, OSError, RecursionError, SafetensorError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error))


def _in_one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        message = f"this machine's memory does not suffice{': ' if message else ''}{message}"
    if isinstance(error, RecursionError):
        message = f"something is nested too deeply: {message}"
    return message or type(error).__name__


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def train(args: list[str]) -> int:
    try:
        from huggingface_hub.utils import disable_progress_bars

        from ddpm_hf import cards, hub, pictures, recipe_choice, training
        from ddpm_hf.config import parse_flags
        from ddpm_hf.data import has_embedded_digits
    except ImportError as error:
        raise ValueError(f"{error}: training needs more packages, `pip install ddpm-hf[train]`") from error

    config = recipe_choice.for_training(parse_flags(args))
    on_start, on_save = [announce], [cards.keep_card]
    if config.push_to_hub:
        pushing = hub.PushInBackground()
        disable_progress_bars()  # beside that of the training
        on_start.insert(0, pushing.check)
        on_save.append(pushing)
    if has_embedded_digits(config):  # before the card
        on_save.insert(0, tell_legibility)
    run = training.train(
        config, on_start=on_start, on_save=on_save, preview=pictures.draw_pictures, on_begin=[pictures.draw_data]
    )
    if config.push_to_hub and run.accelerator.is_main_process:
        if not run.stopped_by:
            pushing.finish(run)
        elif run.finished:
            print(f"the model is trained and saved in {run.output_dir}, and not pushed: stopped by {run.stopped_by}; "
                  f"ddpm-hf push {run.output_dir} {pushing.repo_id} does it", file=sys.stderr)  # fmt: skip
    return run.exit_status


def sample(args: list[str]) -> int:
    from ddpm_hf import sampling
    from ddpm_hf.allocator import keep_freed_memory
    from ddpm_hf.pipeline import load_pipeline
    from ddpm_hf.solvers import SOLVERS

    parser = _Parser(prog="ddpm-hf sample", description=sampling.__doc__)
    parser.add_argument("model", help="a pipeline folder, or user/model on the Hub")
    parser.add_argument("--output", default="samples", help="the folder to fill; what is there is not made again")
    parser.add_argument("--num_images", type=int, help="in the folder in the end; default: 16")
    parser.add_argument("--batch_size", type=int, help="made at a time, which changes no image; default: 64")
    parser.add_argument("--seed", type=int, default=0, help="image k is a function of this and k")
    parser.add_argument("--scheduler", help=f"ddpm, {', '.join(SOLVERS)}; default: the model's own")
    parser.add_argument("--num_inference_steps", type=int, help="default: all that it was trained with")
    parser.add_argument("--class_labels", nargs="+", help="names or numbers of classes, in turns")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance; 1: none")
    parser.add_argument("--format", help=f"one of {', '.join(sampling.FORMATS)}; default: png")
    parser.add_argument("--compare", action="store_true", help="compare.png instead: a row a solver, a column a number")
    parser.add_argument("--solvers", nargs="+", help="of --compare; default: all")
    parser.add_argument("--steps", nargs="+", type=int, help="of --compare; default: 5 10 20 50")
    given = parser.parse_args(args)
    others = ("scheduler", "num_inference_steps", "num_images", "batch_size", "format")
    for name in others if given.compare else ("solvers", "steps"):
        if getattr(given, name) is not None:
            raise ValueError(f"--{name} is {'not ' if given.compare else ''}for --compare")
    keep_freed_memory()
    pipeline = load_pipeline(given.model, "model")
    pipeline.set_progress_bar_config(leave=False, disable=True)
    if torch.cuda.is_available():
        pipeline.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    names = pipeline.unet.config.get("class_names") or []
    labels = given.class_labels and [int(x) if x.isdigit() and x not in names else x for x in given.class_labels]
    settings = {"guidance_scale": given.guidance_scale}
    if not given.compare:
        chosen = {name: getattr(given, name) for name in others if getattr(given, name) is not None}
        settings |= {"num_images": 16, "seed": given.seed, "class_labels": labels, **chosen}
        made = sampling.sample_to_folder(pipeline, given.output, **settings)
        print(f"{made} images made -> {given.output}", flush=True)
        return 0
    if labels:
        settings["class_labels"] = [labels[k % len(labels)] for k in range(4)]
    if os.path.exists(given.output) and not os.path.isdir(given.output):
        raise ValueError(f"output={given.output!r} is a file; it must be a folder or not be there yet")
    solvers, steps = given.solvers or ["ddpm", *SOLVERS], given.steps or [5, 10, 20, 50]
    picture = sampling.compare_solvers(pipeline, solvers, steps, seed=given.seed, **settings)
    os.makedirs(given.output, exist_ok=True)
    path = os.path.join(given.output, sampling.COMPARISON)
    save_picture(picture, path)
    print(path)
    return 0


def evaluate(args: list[str]) -> int:
    try:
        from ddpm_hf import comparison, evaluation
    except ImportError as error:
        raise ValueError(f"{error}: evaluating needs more packages, `pip install ddpm-hf[eval]`") from error
    from ddpm_hf.allocator import keep_freed_memory
    from ddpm_hf.features import CHOICES
    from ddpm_hf.solvers import SOLVERS

    parser = _Parser(prog="ddpm-hf evaluate", description=evaluation.__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="a pipeline folder, or user/model on the Hub")
    parser.add_argument("--dataset_name", help="what to compare with; default: what the model was trained on")
    parser.add_argument("--train_data_dir", help="in place of dataset_name, as for training")
    parser.add_argument("--metrics", help=f"of {','.join(evaluation.METRICS)}; default: all")
    parser.add_argument("--features", help=f"for the distances: {CHOICES}; default: digits for them, or imagenet")
    parser.add_argument("--weights", help="ema, the averaged ones, or raw; default: ema")
    parser.add_argument("--num_samples", type=int, help="default: 2000; published scores are of 10,000 and more")
    parser.add_argument("--num_inference_steps", type=int, help="of the samples; default: 50")
    parser.add_argument("--scheduler", help=f"ddpm, {', '.join(SOLVERS)}; default: the model's own")
    parser.add_argument("--guidance_scale", type=float, help="classifier-free guidance; default: 1, none")
    parser.add_argument("--seed", type=int, help="sample k is a function of this and k; default: 0")
    parser.add_argument("--bpd_images", type=int, help="images of the whole bound, each T predictions; default: 64")
    parser.add_argument("--batch_size", type=int, help="images at a time; default: 64")
    parser.add_argument("--output", help="the file to write; the report comes beside it; default: with the model")
    parser.add_argument("--compare", nargs="+", metavar="FILE", help="compare evaluations in place of making one")
    parser.add_argument("--across", nargs="+", default=[], help="of --compare: parts of the protocol that may differ")
    given = {name: value for name, value in vars(parser.parse_args(args)).items() if value is not None}
    across = given.pop("across")
    if "compare" in given:
        if len(given) > 1:
            raise ValueError(f"--compare takes files alone: leave out {', '.join(given.keys() - {'compare'})}")
        print("\n".join(comparison.compare(given["compare"], across)))
        return 0
    if "model" not in given:
        raise ValueError("name a model, or files to --compare")
    if across:
        raise ValueError("--across is for --compare")
    if "metrics" in given:
        given["metrics"] = tuple(name.strip() for name in given["metrics"].split(","))
    keep_freed_memory()
    found = evaluation.evaluate(**given)
    if os.environ.get("RANK", "0") == "0":
        output = given.get("output") or evaluation.output_of(given["model"])
        print("\n".join([*comparison.table(found), f"-> {output}, and report.html beside it"]), flush=True)
        n = found["protocol"].get("num_samples", evaluation.ENOUGH)
        if n < evaluation.ENOUGH and any(name.startswith(("fd", "fid", "inception")) for name in found["metrics"]):
            print(comparison.FEW.format(n=n), file=sys.stderr)
    return 0


def push(args: list[str]) -> int:
    from ddpm_hf import hub

    parser = _Parser(prog="ddpm-hf push", description=hub.__doc__)
    parser.add_argument("folder", help="a pipeline folder, such as training leaves")
    parser.add_argument("repo_id", help="user/model")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--self-contained", action="store_true", help="put in the code, to be used without ddpm_hf")
    parser.add_argument("--revision", help="the branch, made if need be; default: main")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--license", help="of the model, for its card, such as apache-2.0")
    parser.add_argument("--space", action="store_true", help="make a Space too, with the page of `ddpm-hf demo`")
    given = vars(parser.parse_args(args))
    space = given.pop("space")
    address = hub.push(**given)
    if space:
        try:
            print(hub.push_space(given["repo_id"], given["private"]), flush=True)
        except ValueError as error:
            raise ValueError(f"the model is at {address}, but of its Space {error}") from error
    print(address, flush=True)
    return 0


def convert(args: list[str]) -> int:
    try:
        from ddpm_hf import conversion
    except ImportError as error:
        raise ValueError(f"{error}: converting needs more packages, `pip install ddpm-hf[train]`") from error

    parser = _Parser(prog="ddpm-hf convert", description=conversion.__doc__)
    parser.add_argument("source", help="a file of weights, or a folder")
    parser.add_argument("output", help="the pipeline folder to write; it must not be there yet")
    parser.add_argument("--from", dest="kind", metavar="|".join(conversion.KINDS), help="default: told by the weights")
    parser.add_argument("--source-config", help="YAML or JSON in the source's own keys, for what weights do not tell")
    parser.add_argument("--to", metavar="diffusers", help="write a folder that needs no package but diffusers")
    given = parser.parse_args(args)
    if given.to is None:
        lines = conversion.convert(given.source, given.output, given.kind, given.source_config)
    elif given.to != "diffusers":
        raise ValueError(f"to={given.to!r}; the only choice is diffusers")
    elif given.kind or given.source_config:
        raise ValueError("--to takes a pipeline folder of ours: give neither --from nor --source-config with it")
    else:
        lines = conversion.convert_back(given.source, given.output)
    print("\n".join(lines))
    return 0


def demo(args: list[str]) -> int:
    try:
        from ddpm_hf.demo import build_demo, serve
    except ImportError as error:
        raise ValueError(f"{error}: the page needs more packages, `pip install ddpm-hf[demo]`") from error
    from ddpm_hf.pipeline import load_pipeline

    parser = _Parser(prog="ddpm-hf demo", description="A page to try a model in the browser.")
    parser.add_argument("model", help="a pipeline folder, or user/model on the Hub")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines too; default: %(default)s")
    parser.add_argument("--port", type=int, default=7860, help="0: one that is free; default: %(default)s")
    given = parser.parse_args(args)
    pipeline = load_pipeline(given.model, "model")
    pipeline.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipeline.to("cuda")
    page = build_demo(pipeline)
    print(f"{given.model} -> {serve(page, given.host, given.port)} (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0


def plan(args: list[str]) -> int:
    try:
        from ddpm_hf import plan as planning
        from ddpm_hf import recipe_choice
        from ddpm_hf.config import parse_flags
    except ImportError as error:
        raise ValueError(f"{error}: planning needs more packages, `pip install ddpm-hf[train]`") from error

    parser = _Parser(
        prog="ddpm-hf plan",
        description=planning.__doc__,
        epilog="All settings of `ddpm-hf train` are understood too: --config, --train_batch_size, --resolution ...",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, default=1, help="devices that train together; default: %(default)s")
    parser.add_argument("--device", default="h100", help=f"one of {', '.join(planning.DEVICES)}; default: %(default)s")
    parser.add_argument("--num_images", type=int, help="to train on; default: of the data sets of the recipes")
    given, settings = parser.parse_known_args(args)
    config = recipe_choice.for_planning(parse_flags(settings))
    print("\n".join(planning.plan(config, **vars(given))))
    return 0


def recipes(args: list[str]) -> int:
    try:
        from ddpm_hf import recipe_choice
    except ImportError as error:
        raise ValueError(f"{error}: recipes need more packages, `pip install ddpm-hf[train]`") from error

    _Parser(prog="ddpm-hf recipes", description="List the recipes of `ddpm-hf train --config`.").parse_args(args)
    print("\n".join(recipe_choice.listing()))
    return 0


def announce(run) -> None:
    parameters = sum(p.numel() for p in run.pipeline.unet.parameters())
    shape = "x".join(map(str, run.images.shape))
    count = "a stream of" if run.images.num_images is None else run.images.num_images
    print(
        f"{type(run.pipeline.unet).__name__} of {parameters / 1e6:.2f} M parameters, {count} images of "
        f"{shape}, {run.total_steps - run.step} updates to go -> {run.output_dir}",
        flush=True,
    )


def tell_legibility(run) -> None:
    if run.finished and run.pipeline.unet.config.sample_size == 8:  # what the classifier can look at
        from ddpm_hf.legibility import digits_legibility

        config = run.config
        steps, guidance = config.ddpm_num_inference_steps, config.guidance_scale
        legibility = digits_legibility(run.pipeline, steps, config.seed, guidance_scale=guidance)
        run.metrics.extend(legibility.metrics())
        print(legibility, flush=True)
