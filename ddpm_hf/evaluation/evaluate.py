"""How good a model is: numbers with their errors and their protocol, in one file, and a page to look at.

`evaluation.json` is {"protocol": how it was measured, "metrics": {key: {"name", "value", "stderr", "n", ...}}};
`comparison` puts several side by side if their protocols agree.
"""

import contextlib
import importlib
import json
import logging
import pkgutil
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub.constants import HF_HOME

import ddpm_hf.evaluation.metrics
from ddpm_hf.data.config import DataConfig
from ddpm_hf.data.dataset import has_embedded_digits
from ddpm_hf.evaluation.context import FEWEST, METRICS, Context, Findings, protocol_of
from ddpm_hf.evaluation.features.choose import make_extractor
from ddpm_hf.evaluation.reference import data_config, load_references, train_config
from ddpm_hf.evaluation.report import ENOUGH, write_report  # noqa: F401
from ddpm_hf.pipelines.pipeline import load_pipeline, num_classes
from ddpm_hf.utils.files import locked, write
from ddpm_hf.utils.versions import versions

OUTPUT, CURVES, REPORT = "evaluation.json", "by_timestep.csv", "report.html"
SHOWN = 64  # images of a picture
PACKAGES = ("ddpm-hf", "torch", "diffusers", "transformers", "scikit-learn", "scipy", "numpy", "pillow")
log = logging.getLogger(__name__)

# Importing a module registers its metrics, in the order of evaluation.json; new modules need no line here.
_found = sorted(module.name for module in pkgutil.iter_modules(ddpm_hf.evaluation.metrics.__path__))
for _name in dict.fromkeys(("likelihood", "distances", "memorization", "drift", *_found)):
    importlib.import_module(f"ddpm_hf.evaluation.metrics.{_name}")


def evaluate(
    model: str,
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    metrics: tuple[str, ...] = tuple(METRICS),
    features: str | None = None,
    weights: str = "ema",
    num_samples: int = 2000,
    num_inference_steps: int | None = None,
    scheduler: str | None = None,
    guidance_scale: float = 1.0,
    seed: int = 0,
    bpd_images: int = 64,
    batch_size: int = 64,
    output: str | Path | None = None,
    cache: str | Path | None = None,
) -> dict:
    """Measure a model, by all processes of a launcher, and return what the main one writes: `output`, beside a report.

    Args:
        model: a pipeline folder, or user/model on the Hub.
        dataset_name, train_data_dir: what to compare with; by default what the model was trained on.
        metrics: of `METRICS`.
        features: as `make_extractor` has it; by default those of the embedded digits for them, others by "imagenet".
        weights: "ema", the EMA weights, or "raw", the training weights.
        num_samples: distances are biased by their number, so compare those of equal numbers.
        num_inference_steps: of the samples; by default 50, or all if there are fewer.
        scheduler: a solver's name, or the model's own scheduler.
        bpd_images: held-out images whose whole bound is computed, a prediction for each of the T timesteps.
        batch_size: images at a time; it changes no number but by rounding.
        output: the JSON file, by default evaluation.json in the folder of the model, or here for one of the Hub;
            by_timestep.csv and report.html are written beside it, after its name if it has another.
        cache: the folder of the references' features, found again by the content of the images.

    Raises:
        ValueError: a wrong argument, or images that can't be read; nothing has been written then.
    """
    _check(metrics, weights, num_samples, seed, bpd_images, batch_size)
    output = _writable(output_of(model) if output is None else Path(output))
    accelerator = Accelerator()
    # Two at once would do the same work and mix their reports
    with locked(output.parent, output.name) if accelerator.is_main_process else contextlib.nullcontext():
        pipeline = load_pipeline(model, "model", "raw" if weights == "raw" else None).to(accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.unet.eval().requires_grad_(False)
        steps = pipeline.scheduler.config.num_train_timesteps - (scheduler is not None)  # of a solver often one fewer
        config = data_config(model, pipeline, dataset_name, train_data_dir, output)
        context = Context(
            pipeline, accelerator, *load_references(config, pipeline), seed, batch_size, num_samples,
            min(50, max(1, steps)) if num_inference_steps is None else num_inference_steps, scheduler, guidance_scale,
            bpd_images, Path(cache) if cache else Path(HF_HOME) / "ddpm_hf" / "features",
        )  # fmt: skip
        found = _measure(context, _prepare(context, metrics, features, config))
        protocol = protocol_of(context, model, config)
        protocol["weights"] = weights if weights == "raw" or train_config(model) else "as saved"
        protocol["reference"]["as_trained"] = dataset_name is None and train_data_dir is None
        evaluation = {"protocol": protocol | found.protocol | {"versions": versions(PACKAGES)}, "metrics": found.rows}
        if accelerator.is_main_process:
            _write(output, evaluation, found)
        return evaluation


def output_of(model: str) -> Path:
    """Where the evaluation of a model is written by default."""
    return Path(model) / OUTPUT if Path(model).is_dir() else Path(OUTPUT)


def _check(metrics, weights, num_samples, seed, bpd_images, batch_size) -> None:
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics: there is no {name!r}; choose from {', '.join(METRICS)}")
    if not metrics:
        raise ValueError(f"metrics: name at least one of {', '.join(METRICS)}")
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r}; choose from ema, raw")
    for name, value, least in (("num_samples", num_samples, FEWEST), ("bpd_images", bpd_images, 2),
                               ("batch_size", batch_size, 1)):  # fmt: skip
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r} must be an integer in 0 ... 2^63 - 1")


def _writable(output: Path) -> Path:
    """`output`, before an hour's work is done that could not be kept."""
    if output.is_dir():
        raise ValueError(f"output={str(output)!r} is a folder; name a file, such as {output / OUTPUT}")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            return output.absolute()
    except OSError as error:
        raise ValueError(f"output={str(output)!r} can't be written: {error}") from error


def _prepare(context: Context, metrics: tuple[str, ...], features: str | None, config: DataConfig) -> list[str]:
    """Make the feature extractor, check all that can be wrong before an hour's work, and return what to measure."""
    pipeline, train = context.pipeline, context.train
    pipeline.check_call(
        num_inference_steps=context.num_inference_steps, scheduler=context.solver,
        guidance_scale=context.guidance_scale,
        class_labels=None if num_classes(pipeline.unet) is None else [0],
    )  # fmt: skip
    names = [name for name in METRICS if name in metrics]
    needs = {need for name in names for need in METRICS[name].needs}
    if "likelihood" in needs:
        if context.held_out is None:
            raise ValueError("metrics: bpd and loss are of images that were held out, and a single image has none")
        context.noise_scheduler.timesteps  # raises ValueError if there is none  # noqa: B018
    if "features" in needs and len(train) < FEWEST:
        raise ValueError(f"metrics: {len(train)} training images are too few for distances; name others")
    if "samples" in needs and not context.has_held_out:
        log.warning(f"fewer than {FEWEST} images were held out: nothing is compared with them")
    if "features" not in needs and features is None:
        return names
    default = "digits" if has_embedded_digits(config) and train.shape[1:] == (8, 8) else None
    extractor = context.extractor = make_extractor(features or default, train.shape[0], context.accelerator.device)
    extractor(((train.batch(torch.tensor([0])) + 1) / 2).clamp(0, 1))
    unscored = [name for name in names if "logits" in METRICS[name].needs and not extractor.classifies]
    if unscored and len(names) < len(METRICS):
        raise ValueError(f"metrics: 'is' needs classes, which the features {extractor.name!r} do not have")
    if unscored:
        log.warning(f"no Inception Score: the features {extractor.name!r} have no classes")
    return [name for name in names if name not in unscored]


def _measure(context: Context, names: list[str]) -> Findings:
    found, main = Findings(), context.accelerator.is_main_process
    if any("samples" in METRICS[name].needs for name in names):
        made, _ = context.samples, context.references  # by all processes together
        shown = {"samples": made.pixels[:SHOWN], "real": context.subset(context.train, SHOWN)[0]}
        found.pictures = {name: context.picture(images) for name, images in shown.items()}
    for name in names:
        if main or "samples" not in METRICS[name].needs:  # what is made of samples is not worth sharing
            found.add(name, METRICS[name].measure(context))
    return found


def _write(output: Path, evaluation: dict, found: Findings) -> None:
    """The numbers first, so that nothing that happens to a picture can take them away."""
    prefix = "" if output.name == OUTPUT else f"{output.stem}-"
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in (CURVES, REPORT, "report.png"):  # of an evaluation before this one, which once drew a picture
        (output.parent / f"{prefix}{name}").unlink(missing_ok=True)
    write(output, json.dumps(evaluation, indent=2, allow_nan=False) + "\n")
    if found.by_timestep:
        rows = [["" if value is None else f"{value:.9g}" for value in row.values()] for row in found.by_timestep]
        text = "".join(",".join(row) + "\n" for row in [found.by_timestep[0], *rows])
        write(output.parent / f"{prefix}{CURVES}", text)
    try:
        write_report(output.parent / f"{prefix}{REPORT}", evaluation, found.pictures, found.by_timestep)
    except Exception as error:
        log.warning(f"{output} is written, but its report can't be: {type(error).__name__} {error}")
