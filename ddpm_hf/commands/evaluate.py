"""Evaluate a model: write metrics with standard errors and a report, or compare evaluations."""

import dataclasses
import inspect
import os
import sys
import typing
from pathlib import Path

from ddpm_hf.commands.device import add_device, pop_device
from ddpm_hf.commands.parsing import add_field, add_setting


def add_arguments(parser) -> None:
    from ddpm_hf.data.config import READING, DataConfig
    from ddpm_hf.evaluation.evaluate import METRICS, evaluate
    from ddpm_hf.evaluation.features.choose import CHOICES
    from ddpm_hf.schedulers.solvers import EVERY_SOLVER

    defaults = {name: parameter.default for name, parameter in inspect.signature(evaluate).parameters.items()}

    def add(group, name: str, help: str, type=str, default=None) -> None:
        add_setting(group, f"--{name}", defaults[name] if default is None else default, type=type, help=help)

    parser.add_argument("model", nargs="?", help="a pipeline folder, or user/model on the Hub")
    evaluation = parser.add_argument_group("evaluation")
    add(evaluation, "output", "JSON file to write, next to report.html", default="evaluation.json beside the model")
    add(evaluation, "seed", "sample k depends only on the seed and k", int)
    add_device(evaluation)
    data = parser.add_argument_group("data")
    add(data, "dataset_name", "digits, or a data set of the Hub", default="the model's training data")
    add(data, "train_data_dir", "folder of images, instead of --dataset_name")
    types = typing.get_type_hints(DataConfig)
    for field in dataclasses.fields(DataConfig):
        if field.name in READING:
            add_field(data, field, types[field.name])
    metrics = parser.add_argument_group("metrics")
    add(metrics, "metrics", f"comma-separated: {','.join(METRICS)}", default="all")
    add(metrics, "features", f"feature extractor: {CHOICES}", default="digits for the digits, else imagenet")
    add(metrics, "bpd_images", "held-out images whose full variational bound is computed", int)
    samples = parser.add_argument_group("samples")
    add(samples, "weights", "ema: the EMA weights; raw: the training weights")
    add(samples, "num_samples", "number of samples; published scores use 10,000 or more", int)
    add(samples, "num_inference_steps", "sampling steps", int, default="50")
    add(samples, "scheduler", f"solver: {', '.join(EVERY_SOLVER)}", default="the model's own")
    add(samples, "guidance_scale", "classifier-free guidance; 1 disables it", float)
    add(samples, "batch_size", "images per batch", int)
    comparison = parser.add_argument_group("comparison")
    add_setting(comparison, "--compare", None, nargs="+", metavar="FILE", help="compare evaluation.json files")
    add_setting(comparison, "--across", None, nargs="+", help="keys of the protocol that may differ in --compare")


def run(args) -> None:
    from ddpm_hf.evaluation import comparison
    from ddpm_hf.evaluation import evaluate as evaluation
    from ddpm_hf.utils.memory import keep_freed_memory
    from ddpm_hf.utils.results import noise_warning

    pop_device(args)
    given = {name: value for name, value in vars(args).items() if value is not None}
    across = given.pop("across", [])
    if "compare" in given:
        files = given.pop("compare")
        if given:
            raise ValueError(f"--compare cannot be combined with {', '.join(given)}")
        print("\n".join(comparison.compare(files, across)))
        return
    if "model" not in given:
        raise ValueError("give a model to evaluate, or --compare and two or more evaluation.json files")
    if across:
        raise ValueError("--across requires --compare")
    if "metrics" in given:
        given["metrics"] = tuple(name.strip() for name in given["metrics"].split(","))
    keep_freed_memory()
    try:
        found = evaluation.evaluate(**given)
    except evaluation.UnwrittenError as error:
        print("\n".join(comparison.table(error.evaluation)), flush=True)
        raise
    if os.environ.get("RANK", "0") == "0":
        output = Path(given.get("output") or evaluation.output_of(given["model"]))
        report = evaluation.file_beside(output, evaluation.REPORT)
        written = f"{output} and {report}" if report.exists() else output  # a warning has told why there is no report
        print("\n".join([*comparison.table(found), f"-> {written}"]), flush=True)
        warnings = comparison.tint_warning(found), comparison.few_samples_warning(found)
        for warning in (noise_warning(found["metrics"]), *warnings):
            if warning:
                print(warning, file=sys.stderr)
