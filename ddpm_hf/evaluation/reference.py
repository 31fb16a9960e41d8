"""The images that a model is compared with: their data set, their decoding, and the labels of their classes."""

import logging
from collections.abc import Mapping
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
    model: str,
    path: Path | None,
    pipeline: DDPMCustomPipeline,
    dataset_name: str | None,
    train_data_dir: str | None,
    reading: Mapping,
    output: Path,
) -> DataConfig:
    """The data set and its decoding, with the model's training settings if they are known.

    Args:
        path: the model's train_config.json; None if it has none.
        reading: settings of `DataConfig`; the others are those of the training.
        output: the file that the evaluation writes; the report next to it must not become one of the images.

    Raises:
        ValueError: the data set is unknown or does not exist, or `output` lies among its images.
    """
    named = dataset_name is not None or train_data_dir is not None
    if path is None and not named:
        raise ValueError(
            f"model={model!r} has no train_config.json, so its training data are unknown: give --dataset_name or "
            "--train_data_dir"
        )
    changes = {"output_dir": str(output.absolute().parent)}
    if named:
        channels, height, width = pipeline.image_shape
        changes |= {"dataset_name": dataset_name, "train_data_dir": train_data_dir, "dataset_config_name": None}
        changes |= {"channels": channels, "resolution": [height, width]}
        if path is None:
            changes["value_range"] = pipeline.unet.config.get("value_range")
        if dataset_name == EMBEDDED_DIGITS and train_data_dir is None:
            changes |= {"channels": None, "value_range": None, "resolution": None, "random_crop": None}
        if path is not None and dataset_name not in (None, DataConfig.from_json(path).dataset_name):
            changes |= {"group_by": None, "image_column": None, "label_column": None}  # of other data
    changes |= reading
    config = DataConfig(**changes) if path is None else DataConfig.from_json(path, **changes)
    if "cache_dir" not in reading and config.cache_dir and not Path(config.cache_dir).is_dir():
        config.cache_dir = None  # it was on another machine
    folder = config.train_data_dir
    if folder is not None and not named and not Path(folder).exists():
        raise ValueError(
            f"model={model!r} was trained on train_data_dir={folder!r}, which does not exist (the working "
            f"directory is {Path.cwd()}): give its path with --train_data_dir"
        )
    if folder is not None and among_images(Path(folder), output.absolute().parent):
        raise ValueError(
            f"output={str(output)!r} lies among the images of train_data_dir={folder!r}: name a file in another folder"
        )
    if config.streaming:
        config.streaming = False
        log.warning(
            "The model was trained with streaming. If its data set has no test split, training may have used some of "
            "the images that are held out here."
        )
    return config


def train_config_path(model: str, required: bool = True) -> Path | None:
    """The train_config.json of a folder or of a model on the Hub; None if it has none.

    Raises:
        ValueError: the file is `required` and can't be downloaded. If it is not required, a warning is logged.
    """
    path = Path(model) / "train_config.json"
    if Path(model).exists():
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(model, "train_config.json"))
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:  # the network, the Hub and the cache have no common error
        failure = f"model={model!r}: train_config.json could not be downloaded: {reason(error)}"
        if required:
            raise ValueError(failure) from error
        log.warning(f"{failure}. The images are decoded with the default settings, not with those of its training.")
        return None


def load_references(config: DataConfig, pipeline: DDPMCustomPipeline) -> tuple[ImageData, ImageData | None]:
    """Training and held-out images, with the network's labels for their classes.

    Images are not flipped or turned. With `random_crop` they are windows of the size of the samples: one of each image,
    at a random place that is always the same.

    Raises:
        ValueError: the images can't be read, or do not have the shape or the classes of the model.
    """
    train, held_out = load_images(config, test_limit=None)
    train = train.cropped()
    if train.fill is not None:
        log.warning(f"nodata={config.nodata!r}: here missing values count as if they were the value that fills them.")
    if train.shape != pipeline.image_shape:
        raise ValueError(
            f"the images of {config.train_data_dir or config.dataset_name!r} have the shape {train.shape} (channels, "
            f"height, width), but the model generates {pipeline.image_shape}: give images of that shape"
        )
    if train.has_alpha and pipeline.unet.config.get("has_alpha") is False:
        raise ValueError(
            f"the images of {config.train_data_dir or config.dataset_name!r} have alpha as their last channel, and the "
            "model has a band there: give images of the same bands, or --alpha_channel false"
        )
    classes, names = num_classes(pipeline.unet), train.label_names
    if classes is not None and train.no_classes:
        raise ValueError(f"the model is class-conditional and the images have no classes: {train.no_classes}")
    if classes is None or names is None:
        return train, held_out
    known = pipeline.unet.config.get("class_names") or (
        list(map(str, range(classes))) if len(names) > classes else names
    )
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"the images have classes that the model was not trained on: {', '.join(unknown)[:80]}; the model has "
            f"{', '.join(known)[:200]}"
        )
    labels = torch.tensor([known.index(name) for name in names])
    for images in (train, held_out):
        if images is not None and images.labels is not None:
            images.labels = torch.where(images.labels < 0, images.labels, labels[images.labels.clamp(min=0)])
    return train, held_out
