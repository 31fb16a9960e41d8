"""`DataConfig`: where the images are and how they are decoded."""

import dataclasses
import functools
import math
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_hf.utils.arguments import (
    any_of,
    boolean,
    check,
    integer,
    list_of,
    number,
    one_of,
    optional,
    require,
    show,
    text,
)
from ddpm_hf.utils.yaml_files import read_yaml

EMBEDDED_DIGITS = "digits"
EARLIER_SPLIT = "random"  # of runs whose settings do not name their split
BELOW_1 = number(0, below=1)
SIDE = integer(1, 2**16, "larger than any real image")
LARGEST_FLOAT64 = sys.float_info.max
SIDES = list_of(SIDE, "one or two integers", 1, 2)


def _resolution(value):
    """One side, for a square, or a list of height and width."""
    if not isinstance(value, list | tuple) and getattr(value, "ndim", 0) != 1:
        return SIDE(value)
    sides = list(SIDES(value))
    return sides[0] if len(set(sides)) == 1 else sides


def _sides(value) -> tuple[int, int] | None:
    """(height, width) of what `_resolution` has read."""
    return (value, value) if isinstance(value, int) else value and (*value,)


def _nodata(value):
    """A number, "nan" or "tag". NaN is text, because JSON has no such number."""
    if isinstance(value, str):
        if value in ("nan", "tag"):
            return value
        value = float(value)  # from the command line
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    return float(number(-LARGEST_FLOAT64, LARGEST_FLOAT64)(value))


# What a data set of its own may need to be read, which `evaluate` takes for the images that it compares with
READING = ("image_column", "label_column", "resize", "frames", "slices", "value_range", "clip_values", "nodata",
           "nodata_fill", "alpha_channel", "background", "cache_dir")  # fmt: skip


def setting(group: str, help: str, default=None, rule=None):
    """A field with its heading and text in `--help`, its default and its rule, by default that of its type."""
    metadata = {"group": group, "help": help, "rule": rule}
    return (
        field(default_factory=dict, metadata=metadata) if default == {} else field(default=default, metadata=metadata)
    )


_data = functools.partial(setting, "data")


@dataclass
class DataConfig:
    """The settings of the data set. An invalid value raises a ValueError with the setting and the valid values."""

    dataset_name: str | None = _data(
        "a data set on the Hub, or `digits` for the 1,797 images of 8x8 digits in scikit-learn", EMBEDDED_DIGITS
    )
    dataset_config_name: str | None = _data("the configuration (subset) of the data set on the Hub")
    train_data_dir: str | None = _data(
        "use this folder instead of dataset_name: it holds images, parquet files, WebDataset tars, zips of images, or "
        "a saved `Dataset`; or use this .zip of images"
    )
    image_column: str | None = _data("the column of the images; default: the only one, else an error asks")
    label_column: str | None = _data(
        "the column of the classes: of type ClassLabel, or of integers or texts; default: the only one of type "
        "ClassLabel, or one called label or cls"
    )
    resolution: int | list[int] | None = _data(
        "height and width in pixels, or one number for both; default: keep the size", rule=_resolution
    )
    resize: str = _data(
        "how images of another ratio come to resolution: crop (scale the shorter side and cut out the centre), pad "
        "(scale the longer side; the rest is black, or transparent if there is alpha) or squeeze (distort)",
        "crop",
        one_of("crop", "pad", "squeeze"),
    )
    random_crop: int | list[int] | None = _data(
        "bring images to this size in place of resolution, and train on a random window of `resolution` pixels of "
        "each, another one each time: height and width, or one number for both; default: no windows",
        rule=_resolution,
    )
    channels: int | None = _data(
        "1 gray, 2 gray and alpha, 3 RGB, 4 RGBA, or a number of bands, as in satellite images and arrays; default: "
        "those of the first image",
        rule=integer(1, 1024, "more than any real image has"),
    )
    frames: str | None = _data(
        "frames of an animation or pages of a TIFF file: first (read only the first one), all (each is an image), "
        "channels (each is a channel of one image) or composite (those that are channels of an image, as ImageJ and "
        "OME-TIFF files say, make an image); default: an error asks",
        rule=one_of("first", "all", "channels", "composite"),
    )
    slices: int | None = _data(
        "each index along this axis, counted from 0, of an array of three or four axes (.npy), or of each volume of a "
        "NIfTI file, is an image",
        rule=integer(0, 3),
    )
    value_range: list[float] | None = _data(
        "the pixel values of black and white; required for images of more than 8 bits",
        rule=list_of(number(), "numbers", 2, 2),
    )
    clip_values: bool = _data("make values outside value_range black or white; else they are an error", False)
    nodata: str | float | None = _data(
        "the pixel value that stands for missing ones, which the loss leaves out: a number, nan, or tag for what "
        "GDAL's nodata tag or the mask of each TIFF file says",
        rule=any_of("must be a number, nan or tag", _nodata),
    )
    nodata_fill: float | None = _data(
        "the pixel value that the network sees in the place of missing ones; default: black", rule=number()
    )
    alpha_channel: bool | None = _data(
        "whether the last of 2 or 4 channels is alpha (true) or a band such as near infrared (false); default: as the "
        "file says, and a band in arrays"
    )
    background: list[float] | None = _data(
        "blend transparent images with this colour: one number or one per colour, 0 (black) to 1",
        rule=list_of(number(0, 1), "numbers in [0, 1]"),
    )
    max_bad_fraction: float = _data(
        "raise an error if more than this fraction of the images is broken", 0.01, number(0, below=1)
    )
    group_by: str | None = _data(
        "keep the images of a group, such as a patient, video or volume, together when some are held out: `folder`, a "
        "column, or a regular expression for the path, such as 'patient(\\d+)'"
    )
    held_out_split: str = _data(
        "what to hold out of a data set without a test split: `stratified` keeps classes in proportion, and copies and "
        "groups together; `random` is the split of earlier versions",
        "stratified",
        one_of("stratified", EARLIER_SPLIT),
    )
    streaming: bool = _data("read and decode the images during training instead of keeping them", False)
    dataloader_num_workers: int = _data(
        "processes that decode images; 0: the training process does", 0, integer(0, 1024, "each is a process")
    )
    cache_dir: str | None = _data(
        "folder in which decoded images, and data sets of the Hub, are kept for later runs; default: the cache of "
        "`datasets`, see HF_DATASETS_CACHE"
    )
    seed: int = setting(
        "optimisation", "seed of weights, order of the data, noise and samples", 0, integer(0, 2**63 - 1)
    )
    output_dir: str = setting("run", "folder for the results; it must not contain the images", ".")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            options = typing.get_args(f.type) or (f.type,)
            rule = f.metadata["rule"] or (boolean if bool in options else text)
            value = check(f.name, getattr(self, f.name), optional(rule, "null") if types.NoneType in options else rule)
            if type(value) is int and float in options:
                value = float(value)
            setattr(self, f.name, list(value) if isinstance(value, tuple) else value)
        ordered = self.value_range is None or self.value_range[0] < self.value_range[1]
        self._check("value_range", ordered, "must be two numbers, the value of black and the greater value of white")
        sides = zip(self.image_size or (math.inf,), self.stored_size or ())
        fits = self.random_crop is None or all(side <= stored for side, stored in sides)
        self._check("random_crop", fits, f"needs a resolution of at most that, not {show(self.resolution)}")
        splits = self.group_by is None or self.held_out_split != EARLIER_SPLIT
        self._check("group_by", splits, f"needs held_out_split='stratified', not {EARLIER_SPLIT!r}")
        self._check("clip_values", not self.clip_values or self.value_range is not None, "needs value_range")
        low, high = self.value_range or (0, 255)
        fills = self.nodata_fill is None or (self.nodata is not None and low <= self.nodata_fill <= high)
        self._check("nodata_fill", fills, f"needs nodata and must be a pixel value in {low:g} ... {high:g}")
        many = self.frames in ("all", "composite")
        several = f"frames={self.frames}" if many else "slices"
        one = not many and self.slices is None
        self._check("streaming", not self.streaming or one, f"reads one image a row, and {several} reads several")

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the images, if `resolution` says so."""
        return _sides(self.resolution)

    @property
    def stored_size(self) -> tuple[int, int] | None:
        """(height, width) of the images from which windows of `image_size` are cut, or the same without windows."""
        return _sides(self.random_crop) or self.image_size

    @classmethod
    def from_json(cls, path: str | Path, **changes) -> "DataConfig":
        """Read the data settings in a train_config.json and replace some with `changes`."""
        saved = read_yaml(path, "train_config")
        names = {f.name for f in dataclasses.fields(DataConfig)}
        changes = {"held_out_split": saved.get("held_out_split", EARLIER_SPLIT)} | changes
        return cls(**{name: value for name, value in saved.items() if name in names} | changes)

    def _check(self, name: str, holds: bool, words: str) -> None:
        require(name, getattr(self, name), holds, words)
