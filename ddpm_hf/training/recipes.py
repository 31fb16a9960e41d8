"""Chooses a recipe by the size of the images if the user names none, and lists the packaged recipes."""

import math
import os

from ddpm_hf.data.config import EMBEDDED_DIGITS
from ddpm_hf.data.dataset import decoder_of
from ddpm_hf.data.decoding import Decoded
from ddpm_hf.data.sources import source_of
from ddpm_hf.data.workers import decode_each
from ddpm_hf.training.config import TrainConfig, recipe_names, recipe_text, resolve
from ddpm_hf.training.plan import KNOWN, bytes_in_words, count_flops, count_memory, image_shape, network

LARGEST_SIDE = {"digits": 12, "images-32": 48, "images-64": 96, "images-128": math.inf}  # pixels, increasing
OF_GRAY = {"images-32": "mnist"}  # replacements for images of one channel


def recipe_for(shape: tuple[int, int, int]) -> str:
    """The name of the recipe for images of shape (C, H, W)."""
    name = next(name for name, side in LARGEST_SIDE.items() if max(shape[1:]) <= side)
    return OF_GRAY.get(name, name) if shape[0] == 1 else name


def for_training(flags: dict) -> TrainConfig:
    """The configuration of `flags`. If they name a data set and no recipe, the images choose the recipe.

    The first image that can be decoded decides, or `resolution` and `channels` if both are given. The main process
    prints the recipe and its cost in one line.
    """
    config = resolve(flags)
    if not _needs_choice(flags):
        return config
    shape, class_names = _look(config)
    if shape is None or (config.class_conditional and not class_names):
        return config  # training raises a ValueError for such data
    config = resolve({**flags, "config": recipe_for(shape)})
    if os.environ.get("RANK", "0") == "0":
        print(_description(config, shape, class_names), flush=True)
    return config


def for_planning(flags: dict) -> TrainConfig:
    """As `for_training`, but without reading images.

    Raises:
        ValueError: the flags and the data set do not determine the shape of the images.
    """
    config = resolve(flags)
    return resolve({**flags, "config": recipe_for(image_shape(config))}) if _needs_choice(flags) else config


def _needs_choice(flags: dict) -> bool:
    has_own_data = flags.get("train_data_dir") or flags.get("dataset_name", EMBEDDED_DIGITS) != EMBEDDED_DIGITS
    return "config" not in flags and bool(has_own_data)


def _look(config: TrainConfig) -> tuple[tuple[int, int, int] | None, list[str] | None]:
    """The shape (C, H, W) of the images, None if none can be decoded, and the names of their classes or None."""
    shape, names = None, None
    if config.channels and config.image_size:
        shape = (config.channels, *config.image_size)
    if shape is None or config.class_conditional:
        items, _, names = source_of(config, config.streaming)
    if shape is None:
        images = (image for _, image in decode_each(items, decoder_of(config), 0) if isinstance(image, Decoded))
        shape = next((image.pixels.shape for image in images), None)
        if shape is not None and config.random_crop:
            shape = (shape[0], *config.image_size)
    return shape, names


def _description(config: TrainConfig, shape: tuple[int, int, int], class_names: list[str] | None) -> str:
    chosen = f"recipe {config.config}, chosen for images of {'x'.join(map(str, shape))} (--config chooses another)"
    if config.pretrained_model_name_or_path is not None:
        return f"{chosen}; the network is that of {config.pretrained_model_name_or_path}"
    unet, batch = network(config, shape, class_names), config.train_batch_size
    parameters = sum(p.numel() for p in unet.parameters())
    flops = sum(map(sum, count_flops(unet, shape)))
    memory = count_memory(unet, shape, batch, config.mixed_precision or "no", config)
    _, height, width = shape
    halved = f"--resolution {max(1, height // 2)} {max(1, width // 2)} halves the sides"  # of what is no square
    advice = "--resolution 128 scales the images down" if min(height, width) >= 128 else halved
    smaller = f"; {advice} and costs less" if max(height, width) > 128 else ""
    return (
        f"{chosen}: {parameters / 1e6:.2f} M parameters, {flops / 1e9:.3g} GFLOPs per image with backward, "
        f"{bytes_in_words(memory.peak)} of tensors at batch {batch}{smaller}"
    )


def listing() -> list[str]:
    """A table of the packaged recipes: name, data, size of images, parameters and purpose."""
    rows = [("recipe", "data", "images", "parameters", "for")]
    for name in recipe_names():
        config = resolve({"config": name})
        known = KNOWN.get(config.dataset_name)
        channels = config.channels or (known[0][0] if known else None)
        unet = network(config, (channels or 3, 64, 64))  # the number of parameters does not depend on the size
        parameters = f"{sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M"
        if config.resolution or known:
            sides = config.image_size or known[0][1:]
            images = "x".join(str(n) for n in (channels, *sides) if n)
        else:  # the range of sides for which it is chosen
            most = LARGEST_SIDE[name]
            least = 1 + max((side for side in LARGEST_SIDE.values() if side < most), default=0)
            images = f"{least} to {most}" if most < math.inf else f"{least} and more"
        purpose = recipe_text(name).splitlines()[0].removeprefix("# ")
        rows.append((name, config.dataset_name or "your own", images, parameters, purpose))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
