"""How good a model is: numbers with their errors and their protocol, in one file, and a page to look at.

`evaluation.json` is {"protocol": how it was measured, "metrics": {name: {"name", "value", "stderr", "n", ...}}};
`comparison` puts several side by side if their protocols agree.
"""

import contextlib
import json
import logging
import math
import os
import tempfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import RemoteEntryNotFoundError
from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf.config import EMBEDDED_DIGITS, TrainConfig, resolve
from ddpm_hf.data import ImageData, has_embedded_digits, load_images
from ddpm_hf.diagnostics import ByTimestep, channel_moments, chosen_timesteps
from ddpm_hf.extractor import Extractor, weights_sha256
from ddpm_hf.feature_stats import images_sha256, in_all, measure_cached
from ddpm_hf.features import make_extractor
from ddpm_hf.fidelity import (
    Estimate,
    frechet_estimate,
    inception_score,
    kernel_distance,
    nearest_neighbours,
    precision_recall_density_coverage,
)
from ddpm_hf.files import Lock, write
from ddpm_hf.films import grid, with_caption
from ddpm_hf.images import to_output
from ddpm_hf.likelihood import (
    BITS,
    estimated_bound,
    fixed_variance_floor,
    full_bound,
    timestep_probabilities,
)
from ddpm_hf.memorization import nearness, share_of_copies
from ddpm_hf.pictures import nearest
from ddpm_hf.pipeline import DDPMCustomPipeline, load_pipeline, num_classes
from ddpm_hf.report import write_report
from ddpm_hf.scheduler import NoiseScheduler
from ddpm_hf.seeds import image_generators, seeded_generator
from ddpm_hf.solvers import SOLVERS, plain_config, scheduler_class
from ddpm_hf.sources import among_images, reason

METRICS = ("bpd", "fd", "kid", "prdc", "is", "memorization", "loss", "drift")
OF_FEATURES, OF_SAMPLES = {"fd", "kid", "prdc", "is"}, {"fd", "kid", "prdc", "is", "memorization", "drift"}
OUTPUT, CURVES = "evaluation.json", "by_timestep.csv"
REPORT = ("report.html", "report.png")
ENOUGH = 10_000  # samples; distances of fewer are not to be compared with published ones
NEIGHBOURS = 5  # k of precision, recall, density and coverage
FEWEST = 2 * NEIGHBOURS  # images that have distances
DRAWS = 16  # timesteps an image, of the fast estimate of the bound
MOST_COMPARED = 1_000  # samples whose neighbours are looked for
MOST_BY_TIMESTEP = 256  # images
MOST_ESTIMATED = 1024  # images of the fast estimate of the bound
SHOWN = 64
PACKAGES = ("ddpm-hf", "torch", "diffusers", "transformers", "scikit-learn", "scipy", "numpy", "pillow")
log = logging.getLogger(__name__)


def evaluate(
    model: str,
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    metrics: tuple[str, ...] = METRICS,
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
    """Measure a model, by all processes of a launcher; the main one writes `output` and the report beside it.

    Args:
        model: a pipeline folder, or user/model on the Hub.
        dataset_name, train_data_dir: what to compare with; by default what the model was trained on.
        metrics: of `METRICS`.
        features: as `make_extractor` has it; by default those of the embedded digits for them, others by "imagenet".
        weights: "ema", the averaged ones, or "raw".
        num_samples: distances are biased by their number, so compare those of equal numbers.
        num_inference_steps: of the samples; by default 50, or all if there are fewer.
        scheduler: a solver's name, or the model's own scheduler.
        bpd_images: held-out images whose whole bound is computed, a prediction for each of the T timesteps.
        batch_size: images at a time; it changes no number but by rounding.
        output: the JSON file, by default evaluation.json in the folder of the model, or here for one of the Hub;
            by_timestep.csv, report.html and report.png are written beside it, after its name if it has another.
        cache: the folder of the references' feature statistics, found again by the content of the images.

    Returns:
        What is in the file.

    Raises:
        ValueError: an argument that can't be, or a data set that can't be had; nothing has been written then.
    """
    _check(metrics, weights, num_samples, seed, bpd_images, batch_size)
    output = _writable(output_of(model) if output is None else Path(output))
    accelerator = Accelerator()
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} processes were launched and each would do all of the work: use "
            "`accelerate launch`, or set ACCELERATE_USE_CPU=true where there is no other device"
        )
    # Two at once would do the same work and mix their reports
    with Lock(output.parent, output.name) if accelerator.is_main_process else contextlib.nullcontext():
        pipeline = load_pipeline(model, "model", "raw" if weights == "raw" else None)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(accelerator.device)
        pipeline.unet.eval().requires_grad_(False)
        steps = num_inference_steps
        if steps is None:  # some solvers can't visit every timestep
            steps = min(50, max(1, pipeline.scheduler.config.num_train_timesteps - (scheduler is not None)))
        config = data_config(model, pipeline, dataset_name, train_data_dir, output)
        train, held_out = load_images(config, test_limit=None)
        if train.shape != pipeline.image_shape:
            raise ValueError(
                f"the images of {config.train_data_dir or config.dataset_name!r} are {train.shape} (channels, height, "
                f"width), and those of the model {pipeline.image_shape}: evaluate it on images of its own kind"
            )
        run = _Evaluation(
            pipeline, accelerator, train, held_out, set(metrics), seed, batch_size, num_samples, steps, scheduler,
            guidance_scale, bpd_images, Path(cache) if cache else Path(HF_HOME) / "ddpm_hf" / "features",
        )  # fmt: skip
        run.check()
        if run.metrics & OF_FEATURES or features is not None:
            channels = train.shape[0]
            default = "digits" if has_embedded_digits(config) and train.shape[1:] == (8, 8) else None
            run.extractor = make_extractor(features or default, channels, accelerator.device)
            run.check_extractor()
        found = run.measured()
        protocol = {
            "model": {
                "name": Path(model).resolve().name if Path(model).exists() else model,
                "sha256": weights_sha256(pipeline.unet),
                "parameters": sum(p.numel() for p in pipeline.unet.parameters()),
                "scheduler": plain_config(pipeline.scheduler),
            },
            "weights": weights if weights == "raw" or _train_config(model) else "as saved",
            **run.protocol(config),
        }
        protocol["reference"]["as_trained"] = dataset_name is None and train_data_dir is None
        evaluation = {"protocol": protocol, "metrics": found}
        if accelerator.is_main_process:
            _keep(output, evaluation, run)
        return evaluation


def _keep(output: Path, evaluation: dict, run: "_Evaluation") -> None:
    """The numbers first, so that nothing that happens to a picture can take them away."""
    text = json.dumps(evaluation, indent=2, allow_nan=False) + "\n"
    prefix = "" if output.name == OUTPUT else f"{output.stem}-"
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in (CURVES, *REPORT):  # of an evaluation before this one
        (output.parent / f"{prefix}{name}").unlink(missing_ok=True)
    write(output, text)
    if run.by_timestep:
        write(output.parent / f"{prefix}{CURVES}", _csv(run.by_timestep))
    try:
        write_report(output.parent, evaluation, run.pictures, run.by_timestep, prefix)
    except Exception as error:
        log.warning(f"{output} is written, but its report can't be: {type(error).__name__} {error}")


def output_of(model: str) -> Path:
    return Path(model) / OUTPUT if Path(model).is_dir() else Path(OUTPUT)


def data_config(
    model: str, pipeline, dataset_name: str | None, train_data_dir: str | None, output: Path | None = None
) -> TrainConfig:
    """Where the images come from and how they are decoded: as the model's training did, where that is known.

    Args:
        output: what is written, with pictures beside it, which must not lie among the images.
    """
    path = _train_config(model)
    named = dataset_name is not None or train_data_dir is not None
    if path is None and not named:
        raise ValueError(
            f"model={model!r} does not say what it was trained on (it has no train_config.json): give --dataset_name "
            "or --train_data_dir"
        )
    flags = {} if path is None else {"config": str(path)}
    if named:
        channels, height, width = pipeline.image_shape
        flags |= {"dataset_name": dataset_name, "train_data_dir": train_data_dir, "dataset_config_name": None}
        flags |= {"channels": channels, "resolution": height if height == width else None}
        if dataset_name == EMBEDDED_DIGITS and train_data_dir is None:
            flags |= {"channels": None, "value_range": None, "resolution": None}
    output = (output or output_of(model)).absolute()
    flags |= {"output_dir": str(output.parent), "streaming": False, "max_train_steps": 1}
    config = resolve(flags)
    folder = config.train_data_dir
    if folder is not None and not named and not Path(folder).is_dir():
        raise ValueError(
            f"the folder {folder!r}, which model={model!r} was trained on, is not "
            f"{'here' if Path(folder).is_absolute() else f'in {Path.cwd()}'}: give its path with --train_data_dir"
        )
    if folder is not None and among_images(Path(folder), output.parent):
        raise ValueError(
            f"output={str(output)!r} lies among the images of train_data_dir={folder!r}, and the picture of its report "
            "would be taken for one of them: name a file in another folder"
        )
    if path is not None and json.loads(path.read_text(encoding="utf-8")).get("streaming"):
        log.warning(
            "the model was trained on a stream: if its data set has no test split, some of the images that are held "
            "out here were trained on there"
        )
    return config


def _train_config(model: str) -> Path | None:
    path = Path(model) / "train_config.json"
    if Path(model).exists():
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(model, "train_config.json"))
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:  # the network, the Hub and the cache all raise their own
        raise ValueError(f"model={model!r}: its train_config.json can't be had: {reason(error)}") from error


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


def _ours(pipeline: DDPMCustomPipeline) -> NoiseScheduler:
    """The model's process as our scheduler has it, whichever it samples with.

    Raises:
        ValueError: ours has no such process.
    """
    scheduler, unet = pipeline.scheduler, pipeline.unet.config
    if isinstance(scheduler, NoiseScheduler):
        return scheduler
    config = dict(scheduler.config)
    if unet.get("out_channels") == 2 * unet.in_channels:
        config["variance_type"] = "learned_range"
    elif config.get("variance_type") is None:  # solvers that have no variance
        config["variance_type"] = "fixed_small"
    try:
        return scheduler_class(config).from_config(config)
    except ValueError as error:
        raise ValueError(
            f"metrics: bpd and loss are not known for the model's {type(scheduler).__name__}: {error}"
        ) from error


@dataclass
class _Samples:
    """Of all samples, in the order of their numbers: features (N, D) and logits (N, K) or None, moments (N, 2, C).

    And the pixels of the first of them, (n, C, H, W) in [-1, 1].
    """

    features: torch.Tensor | None
    logits: torch.Tensor | None
    moments: torch.Tensor
    pixels: torch.Tensor


@dataclass
class _Evaluation:
    pipeline: DDPMCustomPipeline
    accelerator: Accelerator
    train: ImageData
    held_out: ImageData | None
    metrics: set[str]
    seed: int
    batch_size: int
    num_samples: int
    steps: int
    solver: str | None
    guidance_scale: float
    bpd_images: int
    cache: Path
    extractor: Extractor | None = None
    found: dict[str, dict] = field(default_factory=dict)
    by_timestep: list[dict] = field(default_factory=list)
    pictures: dict[str, Image.Image] = field(default_factory=dict)

    def check(self) -> None:
        classes = {} if num_classes(self.pipeline.unet) is None else {"class_labels": [0]}
        self.pipeline.check_call(
            num_inference_steps=self.steps, scheduler=self.solver, guidance_scale=self.guidance_scale, **classes
        )
        if self.metrics & {"bpd", "loss"} and self.held_out is None:
            raise ValueError("metrics: bpd and loss are of images that were held out, and a single image has none")
        if self.metrics & OF_FEATURES and len(self.train) < FEWEST:
            raise ValueError(f"metrics: {len(self.train)} training images are too few for distances; name others")
        if self.metrics & OF_SAMPLES and (self.held_out is None or len(self.held_out) < FEWEST):
            log.warning(f"fewer than {FEWEST} images were held out: nothing is compared with them")
        if self.metrics & {"bpd", "loss"}:
            self.ours = _ours(self.pipeline)
        self._check_classes()

    def _check_classes(self) -> None:
        """Have the labels of the data number the classes as the network does."""
        unet, names = self.pipeline.unet.config, self.train.label_names
        classes = num_classes(self.pipeline.unet)
        if classes is None or names is None:
            return
        known = unet.get("class_names") or ([str(k) for k in range(classes)] if len(names) > classes else names)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"the images have the classes {', '.join(names)[:200]}, and the model {', '.join(known)[:200]}: "
                f"{', '.join(unknown)[:80]} it does not know"
            )
        number_of = torch.tensor([known.index(name) for name in names])
        for images in (self.train, self.held_out):
            if images is not None and images.labels is not None:
                images.labels = torch.where(images.labels < 0, images.labels, number_of[images.labels.clamp(min=0)])

    def check_extractor(self) -> None:
        """By one image, before an hour's work is done."""
        self.extractor(((self.train.batch(torch.tensor([0])) + 1) / 2).clamp(0, 1))
        if "is" in self.metrics and not self.extractor.classifies:
            if self.asked_for_all:
                self.metrics.discard("is")
                log.warning(f"no Inception Score: the features {self.extractor.name!r} have no classes")
            else:
                raise ValueError(f"metrics: 'is' needs classes, which the features {self.extractor.name!r} do not have")

    @property
    def asked_for_all(self) -> bool:
        return self.metrics == set(METRICS)

    def measured(self) -> dict[str, dict]:
        """All that was asked for, in the order in which it is told; in the main process."""
        if "bpd" in self.metrics:
            self._bits()
        if "loss" in self.metrics:
            self._loss()
        if self.metrics & OF_SAMPLES:
            self._samples()
        return self.found

    # ---------------------------------------------------------------- likelihood

    def _predict(self, sample, timesteps, labels):
        """As `likelihood` asks for it: float64 of float64, through the network's own dtype."""
        unet = self.pipeline.unet
        classes = {} if labels is None else {"class_labels": labels.to(unet.device)}
        return unet(sample.to(unet.device, unet.dtype), timesteps.to(unet.device), **classes).sample.double().cpu()

    def _all(self, images: ImageData, most: int):
        """Evenly spread images (N, C, H, W) and their labels or None."""
        indices = torch.linspace(0, len(images) - 1, min(most, len(images))).round().long()
        classes = num_classes(self.pipeline.unet)
        if classes is None:
            return images.batch(indices), None
        labels = torch.full((len(indices),), classes) if images.labels is None else images.labels[indices].clone()
        labels[labels < 0] = classes
        return images.batch(indices), labels

    def _mine(self, images: ImageData, most: int):
        """Those of `_all` that are this process's, and their numbers."""
        images, labels = self._all(images, most)
        numbers = list(range(self.accelerator.process_index, len(images), self.accelerator.num_processes))
        return images[numbers], None if labels is None else labels[numbers], numbers

    def _bits(self) -> None:
        levels, ours = self.held_out.levels, self.ours
        settings = {"seed": self.seed, "levels": levels, "batch_size": self.batch_size}
        images, labels, numbers = self._mine(self.held_out, self.bpd_images)

        def whole():
            shown = self._bar(numbers, "bits per dimension")
            prior, terms = full_bound(self._predict, ours, images, labels, shown, **settings)
            return [(prior, terms[:, 1:].sum(1), terms[:, 0])]

        parts = in_all(whole, self.accelerator)
        prior, kl, decoder = (torch.cat(columns) for columns in zip(*parts, strict=True))
        bits, dimensions = prior + kl + decoder, math.prod(self.held_out.shape)
        bound = _mean(bits)
        self._tell("bpd", "Bits per dimension (whole variational bound), held-out images", bound,
                   total_nats=bound.value * dimensions / BITS, total_nats_stderr=bound.stderr * dimensions / BITS,
                   prior=prior.mean().item(), kl=kl.mean().item(), decoder=decoder.mean().item())  # fmt: skip
        floor = fixed_variance_floor(ours, self._all(self.held_out, self.bpd_images)[0], levels)
        if floor is not None:
            self._tell(
                "bpd_floor",
                "What the fixed variance costs even a network that knows the image",
                Estimate(floor, None, None),
            )
        pilot = self._all(self.held_out, 32)
        probabilities = timestep_probabilities(self._predict, ours, *pilot, **settings)
        for name, of, data in (("bpd_fast", "held-out", self.held_out), ("bpd_fast_train", "training", self.train)):
            images, labels, numbers = self._mine(data, MOST_ESTIMATED)

            def estimated(images=images, labels=labels, numbers=numbers):
                shown = self._bar(numbers, "bits per dimension, fast")
                return [estimated_bound(self._predict, ours, images, labels, shown, probabilities, DRAWS, **settings)]

            values = torch.cat(in_all(estimated, self.accelerator))
            self._tell(name, f"Bits per dimension (estimate from {DRAWS} timesteps an image), {of} images",
                       _mean(values))  # fmt: skip

    def _bar(self, numbers: list[int], what: str):
        return tqdm(numbers, what, leave=False, unit=" images", disable=self.accelerator.process_index != 0)

    def _loss(self) -> None:
        timesteps, curves = chosen_timesteps(self.ours), {}
        for name, of, data in (("loss_held_out", "held-out", self.held_out), ("loss_train", "training", self.train)):
            images, labels, numbers = self._mine(data, MOST_BY_TIMESTEP)

            def looked(images=images, labels=labels, numbers=numbers, of=of, levels=data.levels):
                seen = ByTimestep(timesteps)
                shown = self._bar(numbers, f"loss, {of} images")
                seen.see(self._predict, self.ours, images, labels, shown, self.seed, levels, self.batch_size)
                return [seen]

            seen = sum(in_all(looked, self.accelerator), ByTimestep(timesteps))
            curves[name] = seen.columns()
            losses = torch.tensor(seen.losses, dtype=torch.float64)
            self._tell(name, f"Mean squared error of the prediction, mean over timesteps, {of} images", _mean(losses))
        held_out = curves["loss_held_out"]
        columns = {"timestep": timesteps, "loss_held_out": held_out.pop("loss"),
                   "loss_train": curves["loss_train"]["loss"], **held_out}  # fmt: skip
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        self.by_timestep = [
            {name: value if math.isfinite(value) else None for name, value in zip(columns, row, strict=True)}
            for row in rows
        ]

    # ---------------------------------------------------------------- samples

    def _samples(self) -> None:
        made = self._made()
        to_look_at = {"samples": made.pixels, "real": self._all(self.train, SHOWN)[0]}
        for name, images in to_look_at.items():
            self.pictures[name] = grid(to_output(images[:SHOWN], "np"), 8, self._scale)
        references = {}
        if self.extractor is not None:
            for name, images in (("train", self.train), ("held_out", self.held_out)):
                if images is not None and len(images) >= FEWEST:
                    references[name] = measure_cached(
                        self.extractor, images, self.cache, batch_size=self.batch_size, accelerator=self.accelerator
                    )
        if not self.accelerator.is_main_process:
            return  # what follows is not worth sharing
        if "fd" in self.metrics:
            self._frechet(made, references)
        if "kid" in self.metrics:
            self._kernel(made, references)
        if "prdc" in self.metrics:
            self._neighbourhoods(made, references)
        if "is" in self.metrics:
            self._score(made, references)
        if "memorization" in self.metrics:
            self._memorization(made, references)
        if "drift" in self.metrics:
            self._drift(made)

    @property
    def _scale(self) -> int:
        return max(1, 64 // max(self.train.shape[1:]))

    def _sample_labels(self) -> torch.Tensor | None:
        """Of each sample (num_samples,): the classes as often as in the training images, or in turns."""
        classes = num_classes(self.pipeline.unet)
        if classes is None:
            return None
        numbers = torch.arange(self.num_samples)
        known = None if self.train.labels is None else self.train.labels[self.train.labels >= 0]
        if known is None or not len(known):
            return numbers % classes
        order = torch.randperm(len(known), generator=seeded_generator(self.seed, "classes", 0))
        return known[order[numbers % len(known)]]

    def _made(self) -> _Samples:
        """Samples 0 ... num_samples - 1, whichever process makes which."""
        rank, world, size = self.accelerator.process_index, self.accelerator.num_processes, self.batch_size
        labels = self._sample_labels()
        batches = [range(k, min(k + size, self.num_samples)) for k in range(0, self.num_samples, size)]

        def made():
            done = []
            for numbers in tqdm(batches[rank::world], desc="samples", leave=False, disable=rank != 0):
                classes = {} if labels is None else {"class_labels": labels[list(numbers)].tolist()}
                images = self.pipeline(
                    len(numbers), image_generators(self.seed, numbers), self.steps, output_type="pt",
                    scheduler=self.solver, guidance_scale=self.guidance_scale, **classes,
                ).images.float()  # fmt: skip
                features, logits = (None, None) if self.extractor is None else self.extractor(images)
                images = (2 * images - 1).cpu()
                shown = [k for k, number in enumerate(numbers) if number < max(MOST_COMPARED, SHOWN)]
                done.append((numbers[0], features, logits, channel_moments(images), images[shown]))
            return done

        parts = sorted(in_all(made, self.accelerator), key=lambda part: part[0])
        columns = list(zip(*parts, strict=True))[1:]
        return _Samples(*(None if column[0] is None else torch.cat(column) for column in columns))

    def _frechet(self, made, references) -> None:
        inception = self.extractor.is_inception_2015
        key, name = ("fid", "FID") if inception else ("fd", f"Fréchet distance ({self.extractor.name} features)")
        for split, of in references.items():
            self._tell(f"{key}_{split}", f"{name} to the {_words(split)} images",
                       frechet_estimate(made.features, of.stats), n_reference=of.stats.count)  # fmt: skip
        real, of = self._real(references), references["train"].stats
        if real is None:
            return
        if len(real) < len(made.features):  # a distance of fewer is larger, so beside reality stands one of as many
            self._tell(f"{key}_train_matched", f"{name} to the training images, of as many samples as held-out images",
                       frechet_estimate(made.features[: len(real)], of), n_reference=of.count)  # fmt: skip
        self._tell(f"{key}_real", f"{name} of held-out to training images", frechet_estimate(real, of),
                   n_reference=of.count)  # fmt: skip

    def _real(self, references) -> torch.Tensor | None:
        """Features of as many held-out images as there are samples, or of all: what a perfect model would score."""
        if "held_out" not in references:
            return None
        features = references["held_out"].features
        return _spread(features, self.num_samples)

    def _kernel(self, made, references) -> None:
        name = f"Kernel distance, KID ({self.extractor.name} features)"
        for split, of in references.items():
            self._tell(f"kid_{split}", f"{name} to the {_words(split)} images",
                       kernel_distance(made.features, of.features), n_reference=len(of.features))  # fmt: skip
        real = self._real(references)
        if real is not None:
            of = references["train"].features
            self._tell("kid_real", f"{name} of held-out to training images", kernel_distance(real, of),
                       n_reference=len(of))  # fmt: skip

    def _neighbourhoods(self, made, references) -> None:
        for split, of in references.items():
            n = min(len(made.features), len(of.features))
            values = precision_recall_density_coverage(_spread(of.features, n), made.features[:n], NEIGHBOURS)
            for name, value in values.items():
                self._tell(f"{name}_{split}", f"{name.capitalize()}, {_words(split)} images", value)

    def _score(self, made, references) -> None:
        name = "Inception Score" + ("" if self.extractor.is_inception_2015 else f" ({self.extractor.name} classifier)")
        scored, real = {"inception_score": (name, made.logits)}, references.get("held_out")
        if real is not None:
            logits = _spread(real.logits, self.num_samples)
            if len(logits) < len(made.logits):
                words = f"{name}, of as many samples as held-out images"
                scored["inception_score_matched"] = (words, made.logits[: len(logits)])
            scored["inception_score_real"] = (f"{name} of held-out images", logits)
        for key, (words, logits) in scored.items():
            splits = max(2, min(10, len(logits) // 50))
            value, spread = inception_score(logits, splits)
            self._tell(key, words, Estimate(value, spread / math.sqrt(splits - 1), len(logits)), splits=splits)

    def _memorization(self, made, references) -> None:
        pixels = made.pixels[:MOST_COMPARED]
        found, distances = nearest(pixels, self.train, 2)
        closest = distances[:, 0].argsort()[:24]
        pairs = torch.stack([pixels[closest], found[closest, 0]], dim=1).flatten(0, 1)
        caption = [
            f"Of {len(pixels):,} samples the {len(closest)} that are nearest to a training image, by pixels:",
            "sample, its nearest training image, next sample ...",
        ]
        self.pictures["memorization"] = with_caption(grid(to_output(pairs, "np"), 8, self._scale), caption)
        if self.held_out is None or len(self.held_out) < FEWEST:
            return
        unseen, _ = self._all(self.held_out, MOST_COMPARED)
        told = {"pixels": (distances, nearest(unseen, self.train, 2)[1])}
        if self.extractor is not None:
            of_train, of_held_out = (references[name].features for name in ("train", "held_out"))
            queries = made.features[:MOST_COMPARED], _spread(of_held_out, MOST_COMPARED)
            told["features"] = tuple(nearest_neighbours(each, of_train, 2)[1] for each in queries)
        for name, (of_samples, of_unseen) in told.items():
            test = nearness(of_samples[:, 0], of_unseen[:, 0])
            z = Estimate(test.pop("value"), None, len(of_samples))
            copies = {"copies": share_of_copies(of_samples), "copies_held_out": share_of_copies(of_unseen)}
            words = f"Are samples nearer to training images than unseen images are? z, in {name}"
            self._tell(f"memorization_{name}", words, z, **test, **copies, n_held_out=len(of_unseen))

    def _drift(self, made) -> None:
        """Whether colours shift: each channel's mean and standard deviation of samples and of training images."""
        parts = [channel_moments(self.train.batch(p)) for p in torch.arange(len(self.train)).split(1024)]
        real = torch.cat(parts)
        columns = {name: _mean_and_std(moments) for name, moments in (("samples", made.moments), ("train", real))}
        for k, name in enumerate(("mean", "std")):
            samples, train = columns["samples"][k], columns["train"][k]
            difference, c = samples[0] - train[0], (samples[0] - train[0]).abs().argmax()
            stderr = (samples[1][c] ** 2 + train[1][c] ** 2).sqrt().item()
            value = Estimate(difference.abs().max().item(), stderr, len(made.moments))
            self._tell(f"channel_{name}_drift",
                       f"Largest difference of a channel's {'mean' if k == 0 else 'standard deviation'}, pixels in "
                       "[-1, 1]", value, channels=difference.tolist(), samples=samples[0].tolist(),
                       train=train[0].tolist())  # fmt: skip

    def _tell(self, key: str, name: str, estimate: Estimate, **more) -> None:
        told = {"value": estimate.value, "stderr": estimate.stderr, "n": estimate.n, **more}
        lost = [k for k, v in told.items() if isinstance(v, float) and not math.isfinite(v)]  # JSON has no infinity
        self.found[key] = {"name": name, **told, **dict.fromkeys(lost)}

    # ---------------------------------------------------------------- protocol

    def _own_solver(self) -> str:
        """The name by which one would ask for the model's own scheduler."""
        scheduler = self.pipeline.scheduler
        names = [name for name, of in SOLVERS.items() if of == type(scheduler).__name__]
        return "ddpm" if isinstance(scheduler, NoiseScheduler) else (names or [type(scheduler).__name__])[0]

    def protocol(self, config: TrainConfig) -> dict:
        name = config.train_data_dir or config.dataset_name
        name = Path(name).resolve().name if Path(name).exists() else name
        sets = (("train", self.train), ("held_out", self.held_out))
        protocol = {
            "dtype": str(self.pipeline.unet.dtype).removeprefix("torch."),
            "seed": self.seed,
            "reference": {
                "name": name,
                **{
                    split: {"n": len(images), "sha256": images_sha256(images), "shape": list(images.shape)}
                    for split, images in sets
                    if images is not None
                },
            },
        }
        if self.metrics & OF_SAMPLES:
            labels = self._sample_labels()
            own = self.train.labels is not None
            protocol |= {
                "num_samples": self.num_samples,
                "solver": self.solver or self._own_solver(),
                "num_inference_steps": self.steps,
                "guidance_scale": self.guidance_scale,
                "class_labels": None if labels is None else "as in the training images" if own else "in turns",
            }
        if self.extractor is not None:
            of = self.extractor
            protocol["features"] = {
                "name": of.name,
                "sha256": of.sha256,
                "resize": of.resize,
                "pixels": "rounded to 8 bits, as an image file holds them",
            }
        if "prdc" in self.metrics:
            protocol["prdc"] = {"k": NEIGHBOURS, "images": "as many of each as there are of the fewer"}
        if "bpd" in self.metrics:
            protocol["bpd"] = {
                "images": self.bpd_images,
                "levels": self.held_out.levels,
                "timesteps": len(self.ours),
                "draws_of_estimate": DRAWS,
            }
        if "loss" in self.metrics:
            protocol["loss"] = {"images": MOST_BY_TIMESTEP, "timesteps": len(chosen_timesteps(self.ours))}
        if "memorization" in self.metrics:
            protocol["memorization"] = {"most_images": MOST_COMPARED}
        protocol["versions"] = _versions()
        return protocol


def _mean(values: torch.Tensor) -> Estimate:
    n = len(values)
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(n) if n > 1 else math.inf, n)


def _mean_and_std(moments: torch.Tensor):
    """Of each channel over all pixels, (C,), each with its standard error over the images.

    Args:
        moments: (N, 2, C), as `channel_moments` gives them.
    """
    n = max(len(moments), 2)
    (mean, square), spread = moments.mean(0), moments.std(0) if len(moments) > 1 else moments[0] * math.nan
    std = (square - mean**2).clamp(min=0).sqrt()
    # The delta method: d std = (d square - 2 mean d mean) / (2 std), image by image
    linear = (moments[:, 1] - 2 * mean * moments[:, 0]) / (2 * std.clamp(min=1e-12))
    return (mean, spread[0] / math.sqrt(n)), (std, linear.std(0) / math.sqrt(n))


def _spread(rows: torch.Tensor, n: int) -> torch.Tensor:
    """n of the rows, evenly spread: in the order of a data set those of a class may stand together."""
    return rows if len(rows) <= n else rows[torch.linspace(0, len(rows) - 1, n).round().long()]


def _words(split: str) -> str:
    return {"train": "training", "held_out": "held-out"}[split]


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _csv(rows: list[dict]) -> str:
    lines = [",".join(rows[0])]
    lines += [",".join("" if value is None else f"{value:.9g}" for value in row.values()) for row in rows]
    return "\n".join(lines) + "\n"
