"""Evaluate a model: evaluation.json has the metrics, their standard errors and the protocol, report.html shows them.

evaluation.json is {"protocol": how it was measured, "metrics": {key: {"name", "value", "stderr", "n", ...}}}.
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
from ddpm_hf.data.config import READING, DataConfig
from ddpm_hf.data.dataset import has_embedded_digits
from ddpm_hf.evaluation.context import FEWEST, Context, protocol_of
from ddpm_hf.evaluation.features.choose import make_extractor
from ddpm_hf.evaluation.features.stats import unit_batches
from ddpm_hf.evaluation.reference import data_config, load_references, train_config_path
from ddpm_hf.evaluation.registry import METRICS, Findings
from ddpm_hf.evaluation.report import write_report
from ddpm_hf.pipelines.denoising import BATCH
from ddpm_hf.pipelines.pipeline import load_pipeline, num_classes
from ddpm_hf.schedulers.solvers import scheduler_class
from ddpm_hf.utils.arguments import check_names, checked, integer, list_of, mode_of, one_of, optional, path, text
from ddpm_hf.utils.files import locked, write
from ddpm_hf.utils.pictures import columns_for
from ddpm_hf.utils.versions import versions

OUTPUT, CURVES, REPORT = "evaluation.json", "by_timestep.csv", "report.html"
SHOWN = 64  # images per picture
PACKAGES = ("ddpm-hf", "torch", "diffusers", "transformers", "scikit-learn", "scipy", "numpy", "pillow")
log = logging.getLogger(__name__)

# Importing a module registers its metrics. A new module needs no line here: it follows those that are named.
_found = sorted(module.name for module in pkgutil.iter_modules(ddpm_hf.evaluation.metrics.__path__))
_modules = list(dict.fromkeys(("likelihood", "by_timestep", "fidelity", "memorization", "structure", "drift", *_found)))
for _name in _modules:
    importlib.import_module(f"ddpm_hf.evaluation.metrics.{_name}")
# The order of evaluation.json, whichever module was imported first
for _name in sorted(METRICS, key=lambda name: _modules.index(METRICS[name].measure.__module__.rpartition(".")[2])):
    METRICS[_name] = METRICS.pop(_name)


ARGUMENTS = {
    "model": path,
    "dataset_name": optional(text),
    "train_data_dir": optional(path),
    "metrics": list_of(lambda value: one_of(*METRICS)(value), "metrics"),  # another module may register more
    "features": optional(text),
    "weights": one_of("ema", "raw"),
    "num_samples": integer(FEWEST),
    "seed": integer(0, 2**63 - 1),
    "bpd_images": integer(2),
    "batch_size": BATCH,
    "output": optional(path),
    "cache": optional(path),
}


class UnwrittenError(OSError):
    """evaluation.json could not be written; `evaluation` is what it would contain."""

    def __init__(self, message: str, evaluation: dict):
        super().__init__(message)
        self.evaluation = evaluation


@checked(ARGUMENTS)
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
    **reading,
) -> dict:
    """Measure a model, write evaluation.json with a report, and return what evaluation.json contains.

    All processes of a launcher share the work; the main process writes.

    Args:
        model: a pipeline folder, or user/model on the Hub.
        dataset_name, train_data_dir: the images to compare with; by default those that the model was trained on.
        metrics: names in `METRICS`.
        features: see `make_extractor`; by default "digits" for the embedded digits, and "imagenet" for other images of
            1 to 4 channels; without it, metrics of features are left out for images of more channels.
        weights: "ema", the EMA weights, or "raw", the training weights.
        num_samples: distances depend on it, so compare distances of equally many samples.
        num_inference_steps: sampling steps; by default those that the model says, else 50, or all timesteps if there
            are fewer.
        scheduler: the name of a solver; by default the model's own scheduler.
        bpd_images: number of held-out images whose whole bound is computed, with T predictions per image.
        batch_size: images per batch; it changes the results only by rounding.
        output: the JSON file; by default evaluation.json in the model's folder, or in the working directory for a model
            on the Hub. by_timestep.csv and report.html are written next to it, and start with its name if that differs.
        cache: folder for the features of the references, which are found again by the content of the images.
        reading: settings of `DataConfig` in `READING`, for data that are to be read in another way than for training.

    Raises:
        ValueError: an argument is invalid, or the images can't be read. Nothing has been written then.
        UnwrittenError: evaluation.json can't be written. The error has its contents.
    """
    check_names("evaluate", reading, READING)
    output = _writable(output_of(model) if output is None else Path(output))
    accelerator = Accelerator()
    # Two evaluations in one folder would mix their reports
    with locked(output.parent, output.name) if accelerator.is_main_process else contextlib.nullcontext():
        pipeline = load_pipeline(model, "model", "raw" if weights == "raw" else None).to(accelerator.device)
        pipeline.set_progress_bar_config(leave=False, desc="steps", disable=not accelerator.is_main_process)
        pipeline.unet.eval().requires_grad_(False)
        steps = pipeline.scheduler.config.num_train_timesteps - (scheduler is not None)  # some solvers can do T - 1
        as_trained = dataset_name is None and train_data_dir is None
        trained = train_config_path(model, required=as_trained)
        config = data_config(model, trained, pipeline, dataset_name, train_data_dir, reading, output)
        if num_inference_steps is None:
            num_inference_steps = pipeline.config.get("sampling_steps") or min(50, max(1, steps))
        scheduler, num_inference_steps = pipeline.sampler(scheduler, num_inference_steps)
        context = Context(
            pipeline, accelerator, *load_references(config, pipeline), seed, batch_size, num_samples,
            num_inference_steps, scheduler, guidance_scale,
            bpd_images, Path(cache) if cache else Path(HF_HOME) / "ddpm_hf" / "features",
        )  # fmt: skip
        found = _measure(context, _prepare(context, metrics, features, config))
        protocol = protocol_of(context, model, config)
        protocol["weights"] = weights if weights == "raw" or trained else "as saved"
        protocol["reference"]["as_trained"] = as_trained and not reading
        evaluation = {"protocol": protocol | found.protocol | {"versions": versions(PACKAGES)}, "metrics": found.rows}
        if accelerator.is_main_process:
            _write(output, evaluation, found)
        return evaluation


def output_of(model: str) -> Path:
    """The file that the evaluation of a model is written to by default."""
    return Path(model) / OUTPUT if Path(model).is_dir() else Path(OUTPUT)


def file_beside(output: Path, name: str) -> Path:
    """The path of `CURVES` or `REPORT` beside an evaluation; it starts with the name of the evaluation's file."""
    return output.parent / (name if output.name == OUTPUT else f"{output.stem}-{name}")


def _writable(output: Path) -> Path:
    """The absolute path of `output`. Raises ValueError before an hour's work if it can't be written."""
    if output.is_dir():
        raise ValueError(f"output={str(output)!r} is a folder; name a file such as {output / OUTPUT}")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            return output.absolute()
    except OSError as error:
        raise ValueError(f"output={str(output)!r} can't be written: {error}") from error


def _prepare(context: Context, metrics: tuple[str, ...], features: str | None, config: DataConfig) -> list[str]:
    """Check the settings before an hour's work, make the feature extractor, and return the metrics to measure."""
    pipeline, train = context.pipeline, context.train
    pipeline.check_call(
        num_inference_steps=context.num_inference_steps, scheduler=context.solver,
        guidance_scale=context.guidance_scale,
        class_labels=None if num_classes(pipeline.unet) is None else torch.zeros(1, dtype=torch.long),
    )  # fmt: skip
    names = [name for name in METRICS if name in metrics]
    if any("samples" in METRICS[name].needs for name in names):
        names = [name for name in METRICS if name in {*names, "structure"}]  # other metrics of noise say little
    may_leave_out = len(metrics) == len(METRICS)
    if mode_of(channels := train.shape[0], train.has_alpha) is None and features is None:
        why = f"a network for images of {channels} bands, and this package has none: name your own with --features"
        names = _leave_out("features", why, names, may_leave_out)
    if not (kind := scheduler_class(pipeline.scheduler.config)).has_bound:
        why = f"a variational bound, which is not defined for models of {kind.__name__}"
        names = _leave_out("bound", why, names, may_leave_out)
    needs = {need for name in names for need in METRICS[name].needs}
    if "likelihood" in needs:
        if context.held_out is None:
            raise ValueError("metrics: bpd and loss need held-out images, but there is only one image in all")
        context.forward_process.timesteps  # raises ValueError if it is not known  # noqa: B018
    if "features" in needs and not context.has_train:
        rest = [name for name in METRICS if "features" not in METRICS[name].needs]
        raise ValueError(
            f"metrics: distances need at least {FEWEST} training images, but there are {len(train)}; these metrics "
            f"need no distances: {','.join(rest)}"
        )
    if "samples" in needs and not context.has_held_out:
        few = "training images were found" if not context.has_train else "images were held out"
        log.warning(f"Fewer than {FEWEST} {few}, so no samples are compared with held-out images.")
    if "features" not in needs and features is None:
        return names
    default = "digits" if has_embedded_digits(config) and train.shape[1:] == (8, 8) else None
    extractor = context.extractor = make_extractor(
        features or default, train.shape[0], context.accelerator.device, train.has_alpha
    )
    extractor(next(unit_batches(train, 1)))  # raises ValueError if the features do not fit the images
    unscored = [name for name in names if "logits" in METRICS[name].needs and not extractor.classifies]
    if unscored and len(names) < len(METRICS):
        raise ValueError(f"metrics: 'is' needs a classifier, but the features {extractor.name!r} have no logits")
    if unscored:
        log.warning(f"The Inception Score is left out, because the features {extractor.name!r} have no logits.")
    return [name for name in names if name not in unscored]


def _leave_out(need: str, why: str, names: list[str], may_leave_out: bool) -> list[str]:
    """The metrics that do not have this need, which can't be met: in words, `why`.

    Raises:
        ValueError: there are others, and the user has chosen the metrics.
    """
    left_out = [name for name in names if need in METRICS[name].needs]
    one = len(left_out) == 1
    if left_out and not may_leave_out:
        raise ValueError(f"metrics: {','.join(left_out)} {'needs' if one else 'need'} {why}")
    if left_out:
        because = "is left out, because it needs" if one else "are left out, because they need"
        log.warning(f"{', '.join(left_out)} {because} {why}")
    return [name for name in names if name not in left_out]


def _measure(context: Context, names: list[str]) -> Findings:
    found, main = Findings(), context.accelerator.is_main_process
    if any("samples" in METRICS[name].needs for name in names):
        samples, _ = context.samples, context.references  # all processes together
        shown = {"samples": samples.pixels[:SHOWN], "real": context.subset(context.train, SHOWN)[0]}
        columns = columns_for(SHOWN, samples.pixels.shape[1:], context.train.has_alpha)
        found.pictures = {name: context.picture(images, columns) for name, images in shown.items()}
    for name in names:
        if main or "samples" not in METRICS[name].needs:  # metrics of samples are fast
            found.add(name, METRICS[name].measure(context))
    return found


def _write(output: Path, evaluation: dict, found: Findings) -> None:
    """Write evaluation.json first, so that an error in the report loses no numbers."""
    text = json.dumps(evaluation, indent=2, allow_nan=False) + "\n"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for name in (CURVES, REPORT, "report.png"):  # of an earlier evaluation; older versions drew report.png
            file_beside(output, name).unlink(missing_ok=True)
        write(output, text)
        if found.by_timestep:
            rows = [["" if value is None else f"{value:.9g}" for value in row.values()] for row in found.by_timestep]
            text = "".join(",".join(row) + "\n" for row in [found.by_timestep[0], *rows])
            write(file_beside(output, CURVES), text)
    except OSError as error:
        raise UnwrittenError(f"output={str(output)!r} could not be written: {error}", evaluation) from error
    try:
        write_report(file_beside(output, REPORT), evaluation, found.pictures, found.by_timestep)
    except Exception as error:
        log.warning(f"{output} was written, but its report could not be: {type(error).__name__}: {error}")
