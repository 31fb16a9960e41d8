"""The images that a model is compared with: where they are, how they are decoded, and the numbers of their classes."""

import logging
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from ddpm_hf.data.config import EMBEDDED_DIGITS, DataConfig
from ddpm_hf.data.dataset import ImageData, load_images
from ddpm_hf.data.sources import among_images, reason
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline, num_classes

log = logging.getLogger(__name__)


def data_config(
    model: str, pipeline: DDPMCustomPipeline, dataset_name: str | None, train_data_dir: str | None, output: Path
) -> DataConfig:
    """Where the images are and how they are decoded: as the model's training did, where that is known.

    Args:
        output: what is written, with pictures beside it, which must not lie among the images.

    Raises:
        ValueError: the data are not known, or not there, or `output` lies among them.
    """
    path = train_config(model)
    named = dataset_name is not None or train_data_dir is not None
    if path is None and not named:
        raise ValueError(
            f"model={model!r} does not say what it was trained on (it has no train_config.json): give --dataset_name "
            "or --train_data_dir"
        )
    changes = {"output_dir": str(output.absolute().parent)}
    if named:
        channels, height, width = pipeline.image_shape
        changes |= {"dataset_name": dataset_name, "train_data_dir": train_data_dir, "dataset_config_name": None}
        changes |= {"channels": channels, "resolution": height if height == width else None}
        if dataset_name == EMBEDDED_DIGITS and train_data_dir is None:
            changes |= {"channels": None, "value_range": None, "resolution": None}
    config = DataConfig(**changes) if path is None else DataConfig.from_json(path, **changes)
    folder = config.train_data_dir
    if folder is not None and not named and not Path(folder).is_dir():
        raise ValueError(
            f"the folder {folder!r}, which model={model!r} was trained on, is not "
            f"{'here' if Path(folder).is_absolute() else f'in {Path.cwd()}'}: give its path with --train_data_dir"
        )
    if folder is not None and among_images(Path(folder), output.absolute().parent):
        raise ValueError(
            f"output={str(output)!r} lies among the images of train_data_dir={folder!r}: name a file in another folder"
        )
    if config.streaming:
        config.streaming = False
        log.warning(
            "the model was trained on a stream: if its data set has no test split, some of the images that are held "
            "out here were trained on there"
        )
    return config


def train_config(model: str) -> Path | None:
    """The file train_config.json of a folder or of a model on the Hub, if it has one."""
    path = Path(model) / "train_config.json"
    if Path(model).exists():
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(model, "train_config.json"))
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:  # the network, the Hub and the cache all raise their own
        raise ValueError(f"model={model!r}: its train_config.json can't be had: {reason(error)}") from error


def load_references(config: DataConfig, pipeline: DDPMCustomPipeline) -> tuple[ImageData, ImageData | None]:
    """Training and held-out images, with the labels by which the network knows their classes.

    Raises:
        ValueError: they can't be read, or have another shape than the model's images, or other classes.
    """
    train, held_out = load_images(config, test_limit=None)
    if train.shape != pipeline.image_shape:
        raise ValueError(
            f"the images of {config.train_data_dir or config.dataset_name!r} are {train.shape} (channels, height, "
            f"width), and those of the model {pipeline.image_shape}: evaluate it on images of its own kind"
        )
    classes, names = num_classes(pipeline.unet), train.label_names
    if classes is None or names is None:
        return train, held_out
    known = pipeline.unet.config.get("class_names") or (
        list(map(str, range(classes))) if len(names) > classes else names
    )
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"the images have the classes {', '.join(names)[:200]}, and the model {', '.join(known)[:200]}: "
            f"{', '.join(unknown)[:80]} it does not know"
        )
    labels = torch.tensor([known.index(name) for name in names])
    for images in (train, held_out):
        if images is not None and images.labels is not None:
            images.labels = torch.where(images.labels < 0, images.labels, labels[images.labels.clamp(min=0)])
    return train, held_out
