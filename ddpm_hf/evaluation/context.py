"""What metrics measure with: a model, its samples, and the images that they are compared with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf.data.config import DataConfig
from ddpm_hf.data.dataset import ImageData
from ddpm_hf.evaluation.features.extractor import Extractor
from ddpm_hf.evaluation.features.stats import ImageFeatures, measure_cached
from ddpm_hf.pipelines.images import to_output
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline, num_classes
from ddpm_hf.schedulers.noise import NoiseScheduler
from ddpm_hf.schedulers.solvers import own_scheduler, plain_config, scheduler_class
from ddpm_hf.utils.arguments import mode_of
from ddpm_hf.utils.checksums import images_sha256, weights_sha256
from ddpm_hf.utils.distributed import in_all
from ddpm_hf.utils.pictures import grid
from ddpm_hf.utils.seeds import image_generators, seeded_generator

FEWEST = 10  # images for distances: twice the number of neighbours of precision, recall, density and coverage
MOST_KEPT = 1_000  # samples whose pixels are kept
SPLITS = {"train": "training", "held_out": "held-out"}


@dataclass
class Samples:
    """All samples, in the order of their numbers.

    Args:
        features, logits: (N, D) and (N, K), or None without an extractor or a classifier.
        moments: (N, 2, C), from `channel_moments`.
        pixels: the first `MOST_KEPT` samples, (n, C, H, W) in [-1, 1].
    """

    features: torch.Tensor | None
    logits: torch.Tensor | None
    moments: torch.Tensor
    pixels: torch.Tensor


@dataclass
class Context:
    """What metrics measure with. The fields are arguments of `evaluate`; the properties are computed on first use."""

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
    def forward_process(self):
        """The model's forward process as a scheduler of ours, whichever scheduler the model samples with.

        Raises:
            ValueError: none of ours implements this forward process.
        """
        scheduler, unet = self.pipeline.scheduler, self.pipeline.unet.config
        kind = scheduler_class(scheduler.config)
        if isinstance(scheduler, kind) or not issubclass(kind, NoiseScheduler):
            return own_scheduler(scheduler)
        config = dict(scheduler.config)
        if unet.get("out_channels") == 2 * unet.in_channels:
            config["variance_type"] = "learned_range"
        elif config.get("variance_type") is None:  # solvers that have no variance
            config["variance_type"] = "fixed_small"
        try:
            return kind.from_config(config)
        except ValueError as error:
            raise ValueError(
                f"metrics: bpd and loss can't be measured with the model's {type(scheduler).__name__}: {error}"
            ) from error

    def predict(self, sample, timesteps, labels) -> torch.Tensor:
        """The network's output: (B, C, H, W), (B,), (B,) or None -> (B, C or 2 C, H, W), float64 on the CPU."""
        unet = self.pipeline.unet
        classes = {} if labels is None else {"class_labels": labels.to(unet.device)}
        sample = sample.to(unet.dtype).to(unet.device)  # in this order, because MPS has no float64
        return unet(sample, timesteps.to(unet.device), **classes).sample.cpu().double()

    def subset(self, images: ImageData, most: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """At most `most` evenly spread images (N, C, H, W), and their labels (N,), or None without classes.

        An image without a label gets the null label.
        """
        indices, classes = evenly_spread(torch.arange(len(images)), most), num_classes(self.pipeline.unet)
        if classes is None:
            return images.batch(indices), None
        labels = torch.full((len(indices),), -1) if images.labels is None else images.labels[indices]
        return images.batch(indices), torch.where(labels < 0, classes, labels)

    def share(self, measure: Callable, images: ImageData, most: int, description: str) -> list:
        """Divide a `subset` of the images between the processes; every process gets the results of all of them.

        Args:
            measure: called in each process with the images (n, C, H, W), labels and numbers of its part.
            description: text of the progress bar.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        chosen, labels = self.subset(images, most)
        numbers = list(range(rank, len(chosen), world))
        shard = chosen[numbers], None if labels is None else labels[numbers]
        bar = tqdm(numbers, description, leave=False, unit=" images", disable=rank != 0)
        return in_all(lambda: [measure(*shard, bar)], self.accelerator)

    @cached_property
    def sample_labels(self) -> torch.Tensor | None:
        """The class of each sample (num_samples,), as frequent as in the training images, or each class in turn."""
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
        """Samples 0 ... num_samples - 1, generated by all processes together."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batches = torch.arange(self.num_samples).split(self.batch_size)[rank::world]

        def generate():
            return [self._generate_samples(batch) for batch in tqdm(batches, "samples", leave=False, disable=rank != 0)]

        parts = sorted(in_all(generate, self.accelerator), key=lambda part: part[0])
        columns = list(zip(*parts, strict=True))[1:]
        return Samples(*(None if column[0] is None else torch.cat(column) for column in columns))

    def _generate_samples(self, numbers: torch.Tensor) -> tuple:
        """The first of the numbers, and what `Samples` holds of the samples with these numbers."""
        classes = {} if self.sample_labels is None else {"class_labels": self.sample_labels[numbers]}
        images = self.pipeline(
            len(numbers), image_generators(self.seed, numbers.tolist()), self.num_inference_steps, output_type="pt",
            scheduler=self.solver, guidance_scale=self.guidance_scale, **classes,
        ).images.float()  # fmt: skip
        features, logits = (None, None) if self.extractor is None else self.extractor(images)
        images = (2 * images - 1).cpu()
        return numbers[0].item(), features, logits, channel_moments(images), images[numbers < MOST_KEPT]

    @cached_property
    def references(self) -> dict[str, ImageFeatures]:
        """Features of training and held-out images, if there are enough, computed by all processes together."""
        sets = {"train": self.train, "held_out": self.held_out} if self.extractor and self.has_train else {}
        return {
            split: measure_cached(
                self.extractor, images, self.cache, batch_size=self.batch_size, accelerator=self.accelerator
            )
            for split, images in sets.items()
            if images is not None and len(images) >= FEWEST
        }

    def held_out_features(self) -> torch.Tensor | None:
        """Features of at most `num_samples` held-out images, which score what a perfect model would."""
        return evenly_spread(self.references["held_out"].features, self.num_samples) if self.has_held_out else None

    @property
    def has_train(self) -> bool:
        """Whether there are enough training images for distances to them."""
        return len(self.train) >= FEWEST

    @property
    def has_held_out(self) -> bool:
        """Whether there are also enough held-out images, to compare their distances with those of samples."""
        return self.has_train and self.held_out is not None and len(self.held_out) >= FEWEST

    def picture(self, images: torch.Tensor, columns: int = 8, **settings) -> Image.Image:
        """A `grid`, with these settings, of images (B, C, H, W) in [-1, 1]."""
        return grid(to_output(images, "np"), columns, has_alpha=self.train.has_alpha, **settings)


def protocol_of(context: Context, model: str, config: DataConfig) -> dict:
    """The part of the protocol that all metrics share: model, references, samples and features."""
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
    if "samples" in vars(context):  # a metric has used this cached property
        kind = type(pipeline.scheduler).__name__
        solvers = scheduler_class(pipeline.scheduler.config)
        own = solvers.own if isinstance(pipeline.scheduler, solvers) else kind
        labels = "as in the training images" if train.labels is not None else "in turns"
        protocol |= {
            "num_samples": context.num_samples,
            "solver": context.solver or next((name for name, of in solvers.solvers.items() if of == kind), own),
            "num_inference_steps": context.num_inference_steps,
            "guidance_scale": context.guidance_scale,
            "class_labels": None if context.sample_labels is None else labels,
        }
    if extractor is not None:
        protocol["features"] = {key: getattr(extractor, key) for key in ("name", "sha256", "resize")}
        is_blended = extractor.channels == 3 and mode_of(train.shape[0]) in ("LA", "RGBA")
        blended = "; alpha blended with mid-gray" if is_blended else ""
        protocol["features"]["pixels"] = f"rounded to 8 bits, as an image file holds them{blended}"
    return protocol


def _name(place: str) -> str:
    """The name of a folder without its path, or user/name of a repository."""
    return Path(place).resolve().name if Path(place).exists() else place


def channel_moments(images: torch.Tensor) -> torch.Tensor:
    """Mean and mean square of the pixels of each channel of each image: (B, C, H, W) -> (B, 2, C), float64."""
    pixels = images.double().flatten(2)
    return torch.stack([pixels.mean(2), pixels.square().mean(2)], dim=1)


def evenly_spread(rows: torch.Tensor, n: int) -> torch.Tensor:
    """At most n rows, evenly spread, because a data set may be sorted by class."""
    return rows[torch.linspace(0, len(rows) - 1, min(n, len(rows))).round().long()]
