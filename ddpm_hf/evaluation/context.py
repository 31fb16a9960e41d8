"""What metrics measure with: a model, its samples and the images to compare with; and the registry of metrics.

A metric is a function of a `Context` that returns `Findings`, registered by `@metric`. A new one is a new module
`ddpm_hf/metrics_<name>.py`, which `evaluation` finds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf.data.config import DataConfig
from ddpm_hf.data.dataset import ImageData
from ddpm_hf.evaluation.diagnostics import channel_moments
from ddpm_hf.evaluation.features.extractor import Extractor
from ddpm_hf.evaluation.features.stats import Measured, measure_cached
from ddpm_hf.evaluation.fidelity import Estimate
from ddpm_hf.pipelines.images import to_output
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline, num_classes
from ddpm_hf.schedulers.noise import NoiseScheduler
from ddpm_hf.schedulers.solvers import SOLVERS, plain_config, scheduler_class
from ddpm_hf.utils.checksums import images_sha256, weights_sha256
from ddpm_hf.utils.distributed import in_all
from ddpm_hf.utils.pictures import grid
from ddpm_hf.utils.seeds import image_generators, seeded_generator

FEWEST = 10  # images that have distances: twice the neighbours of precision, recall, density and coverage
MOST_KEPT = 1_000  # samples whose pixels are kept
SPLITS = {"train": "training", "held_out": "held-out"}


@dataclass
class Findings:
    """What a metric has measured.

    Args:
        rows: by their keys in evaluation.json, each made by `record`.
        protocol: how they were measured, for the entry of the protocol that has the metric's name.
        pictures: for the report.
        by_timestep: the rows of by_timestep.csv.
    """

    rows: dict[str, dict] = field(default_factory=dict)
    protocol: dict = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    by_timestep: list[dict] = field(default_factory=list)

    def add(self, name: str, other: "Findings") -> None:
        """Take in what the metric `name` has measured."""
        self.rows |= other.rows
        self.protocol |= {name: other.protocol} if other.protocol else {}
        self.pictures |= other.pictures
        self.by_timestep += other.by_timestep


def record(name: str, estimate: Estimate, **more) -> dict:
    """A row of evaluation.json: its name in words, value, standard error, number of images, and what else there is."""
    values = {"value": estimate.value, "stderr": estimate.stderr, "n": estimate.n, **more}
    lost = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    return {"name": name, **values, **dict.fromkeys(lost)}  # JSON has no infinity


@dataclass(frozen=True)
class Metric:
    measure: Callable[["Context"], Findings]
    needs: tuple[str, ...]


METRICS: dict[str, Metric] = {}  # in the order of evaluation.json


def metric(name: str, *needs: str):
    """Register a function as a metric.

    Args:
        name: what it is asked for by.
        needs: "likelihood", held-out images and the model's forward process, of a metric whose work all processes
            share by `Context.share`; or "samples", of one that the main process measures alone, with "features" if it
            can't do without them and "logits" if these must come with a classifier.
    """

    def register(measure: Callable[[Context], Findings]) -> Callable[[Context], Findings]:
        METRICS[name] = Metric(measure, needs)
        return measure

    return register


@dataclass
class Samples:
    """All samples in the order of their numbers.

    Args:
        features, logits: (N, D) and (N, K), or None.
        moments: (N, 2, C), as `channel_moments` gives them.
        pixels: of the first `MOST_KEPT`, (n, C, H, W) in [-1, 1].
    """

    features: torch.Tensor | None
    logits: torch.Tensor | None
    moments: torch.Tensor
    pixels: torch.Tensor


@dataclass
class Context:
    """What a metric is measured with. Arguments are those of `evaluation.evaluate`; the rest is made when asked for."""

    pipeline: DDPMCustomPipeline
    accelerator: Accelerator
    train: ImageData
    held_out: ImageData | None
    seed: int
    batch_size: int
    num_samples: int
    num_inference_steps: int
    solver: str | None
    guidance_scale: float
    bpd_images: int
    cache: Path
    extractor: Extractor | None = None

    @cached_property
    def noise_scheduler(self) -> NoiseScheduler:
        """The model's forward process as our scheduler has it, whichever scheduler the model samples with.

        Raises:
            ValueError: ours has no such process.
        """
        scheduler, unet = self.pipeline.scheduler, self.pipeline.unet.config
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

    def predict(self, sample, timesteps, labels) -> torch.Tensor:
        """The network's output as `likelihood` asks for it: float64 of float64, through the network's own dtype."""
        unet = self.pipeline.unet
        classes = {} if labels is None else {"class_labels": labels.to(unet.device)}
        return unet(sample.to(unet.device, unet.dtype), timesteps.to(unet.device), **classes).sample.double().cpu()

    def subset(self, images: ImageData, most: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """At most so many evenly spread images (N, C, H, W), and their labels (N,) if the network takes any."""
        indices, classes = evenly_spread(torch.arange(len(images)), most), num_classes(self.pipeline.unet)
        if classes is None:
            return images.batch(indices), None
        labels = torch.full((len(indices),), -1) if images.labels is None else images.labels[indices]
        return images.batch(indices), torch.where(labels < 0, classes, labels)

    def share(self, measure: Callable, images: ImageData, most: int, what: str) -> list:
        """What `measure(images, labels, numbers)` of a part of the `subset` returns in each process, in all of them.

        Args:
            what: what the progress bar says.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        chosen, labels = self.subset(images, most)
        numbers = list(range(rank, len(chosen), world))
        shard = chosen[numbers], None if labels is None else labels[numbers]
        bar = tqdm(numbers, what, leave=False, unit=" images", disable=rank != 0)
        return in_all(lambda: [measure(*shard, bar)], self.accelerator)

    @cached_property
    def sample_labels(self) -> torch.Tensor | None:
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

    @cached_property
    def samples(self) -> Samples:
        """Samples 0 ... num_samples - 1, made by all processes together."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batches = torch.arange(self.num_samples).split(self.batch_size)[rank::world]

        def generate():
            return [self._generate_samples(batch) for batch in tqdm(batches, "samples", leave=False, disable=rank != 0)]

        parts = sorted(in_all(generate, self.accelerator), key=lambda part: part[0])
        columns = list(zip(*parts, strict=True))[1:]
        return Samples(*(None if column[0] is None else torch.cat(column) for column in columns))

    def _generate_samples(self, numbers: torch.Tensor) -> tuple:
        """The samples of these numbers: the first number, and what is `Samples`."""
        classes = {} if self.sample_labels is None else {"class_labels": self.sample_labels[numbers].tolist()}
        images = self.pipeline(
            len(numbers), image_generators(self.seed, numbers.tolist()), self.num_inference_steps, output_type="pt",
            scheduler=self.solver, guidance_scale=self.guidance_scale, **classes,
        ).images.float()  # fmt: skip
        features, logits = (None, None) if self.extractor is None else self.extractor(images)
        images = (2 * images - 1).cpu()
        return numbers[0].item(), features, logits, channel_moments(images), images[numbers < MOST_KEPT]

    @cached_property
    def references(self) -> dict[str, Measured]:
        """Features of the training and the held-out images, each if there are enough, by all processes together."""
        sets = {"train": self.train, "held_out": self.held_out} if self.extractor is not None else {}
        return {
            split: measure_cached(
                self.extractor, images, self.cache, batch_size=self.batch_size, accelerator=self.accelerator
            )
            for split, images in sets.items()
            if images is not None and len(images) >= FEWEST
        }

    def held_out_features(self) -> torch.Tensor | None:
        """Of as many held-out images as there are samples, or of all: what a perfect model would score."""
        return evenly_spread(self.references["held_out"].features, self.num_samples) if self.has_held_out else None

    @property
    def has_held_out(self) -> bool:
        """Whether enough images are held out to compare with."""
        return self.held_out is not None and len(self.held_out) >= FEWEST

    def picture(self, images: torch.Tensor) -> Image.Image:
        """Images (B, C, H, W) in [-1, 1], eight a row."""
        return grid(to_output(images, "np"), 8, max(1, 64 // max(self.train.shape[1:])))


def protocol_of(context: Context, model: str, config: DataConfig) -> dict:
    """How samples and references were made; `Findings` say how each metric was measured."""
    pipeline, train, extractor = context.pipeline, context.train, context.extractor
    sets = {"train": train, "held_out": context.held_out}
    protocol = {
        "model": {
            "name": _name(model),
            "sha256": weights_sha256(pipeline.unet),
            "parameters": sum(p.numel() for p in pipeline.unet.parameters()),
            "scheduler": plain_config(pipeline.scheduler),
        },
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "seed": context.seed,
        "reference": {"name": _name(config.train_data_dir or config.dataset_name)} | {
            split: {"n": len(images), "sha256": images_sha256(images), "shape": list(images.shape)}
            for split, images in sets.items() if images is not None
        },
    }  # fmt: skip
    if "samples" in vars(context):  # a cached property that some metric has needed
        kind = type(pipeline.scheduler).__name__
        own = "ddpm" if isinstance(pipeline.scheduler, NoiseScheduler) else kind
        asked = "as in the training images" if train.labels is not None else "in turns"
        protocol |= {
            "num_samples": context.num_samples,
            "solver": context.solver or next((name for name, of in SOLVERS.items() if of == kind), own),
            "num_inference_steps": context.num_inference_steps,
            "guidance_scale": context.guidance_scale,
            "class_labels": None if context.sample_labels is None else asked,
        }
    if extractor is not None:
        protocol["features"] = {key: getattr(extractor, key) for key in ("name", "sha256", "resize")}
        protocol["features"]["pixels"] = "rounded to 8 bits, as an image file holds them"
    return protocol


def _name(place: str) -> str:
    """Of a folder its name alone, of a repository its whole name."""
    return Path(place).resolve().name if Path(place).exists() else place


def mean(values: torch.Tensor) -> Estimate:
    """Of values (N,), with its standard error."""
    n = len(values)
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(n) if n > 1 else math.inf, n)


def evenly_spread(rows: torch.Tensor, n: int) -> torch.Tensor:
    """n of the rows, or all, evenly spread: in the order of a data set those of a class may stand together."""
    return rows[torch.linspace(0, len(rows) - 1, min(n, len(rows))).round().long()]
