"""Measure how good a model is, in numbers with their standard errors and a report, or compare such measurements."""

import inspect
import os
import sys

from ddpm_hf.commands.parsing import add_setting


def add_arguments(parser) -> None:
    from ddpm_hf.evaluation.evaluate import METRICS, evaluate
    from ddpm_hf.evaluation.features.choose import CHOICES
    from ddpm_hf.schedulers.solvers import SOLVERS

    defaults = {name: parameter.default for name, parameter in inspect.signature(evaluate).parameters.items()}

    def add(group, name: str, help: str, type=str, default=None) -> None:
        add_setting(group, f"--{name}", defaults[name] if default is None else default, type=type, help=help)

    parser.add_argument("model", nargs="?", help="a pipeline folder, or user/model on the Hub")
    add(parser, "output", "the file to write; the report comes beside it", default="evaluation.json with the model")
    add(parser, "seed", "sample k is a function of the seed and k", int)
    data = parser.add_argument_group("data")
    add(data, "dataset_name", "what to compare with", default="what the model was trained on")
    add(data, "train_data_dir", "in place of --dataset_name, as for training")
    metrics = parser.add_argument_group("metrics")
    add(metrics, "metrics", f"of {','.join(METRICS)}", default="all")
    add(metrics, "features", f"for the distances: {CHOICES}", default="digits for the embedded digits, else imagenet")
    add(metrics, "bpd_images", "images whose whole variational bound is computed, T predictions each", int)
    samples = parser.add_argument_group("samples")
    add(samples, "weights", "ema, the EMA weights, or raw, the training weights")
    add(samples, "num_samples", "how many; published scores are of 10,000 and more", int)
    add(samples, "num_inference_steps", "sampling steps", int, default="50")
    add(samples, "scheduler", f"ddpm, {', '.join(SOLVERS)}", default="the model's own")
    add(samples, "guidance_scale", "classifier-free guidance; 1: none", float)
    add(samples, "batch_size", "images at a time", int)
    comparison = parser.add_argument_group("comparison")
    add_setting(comparison, "--compare", None, nargs="+", metavar="FILE", help="compare evaluations, and make none")
    add_setting(comparison, "--across", None, nargs="+", help="of --compare: parts of the protocol that may differ")


def run(args) -> None:
    from ddpm_hf.evaluation import comparison
    from ddpm_hf.evaluation import evaluate as evaluation
    from ddpm_hf.utils.memory import keep_freed_memory

    given = {name: value for name, value in vars(args).items() if value is not None}
    across = given.pop("across", [])
    if "compare" in given:
        files = given.pop("compare")
        if given:
            raise ValueError(f"--compare takes files alone: leave out {', '.join(given)}")
        print("\n".join(comparison.compare(files, across)))
        return
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
        if warning := comparison.few_samples_warning(found):
            print(warning, file=sys.stderr)
