"""`DataConfig`: where the images are and how they are decoded."""

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_hf.utils.yaml_files import read_yaml

EMBEDDED_DIGITS = "digits"

# Rules for values: the text of the error and the test. None is not tested where a setting may be None.
AT_LEAST_1 = "must be at least 1", lambda v: v >= 1
AT_LEAST_0 = "must be at least 0 and finite", lambda v: 0 <= v < math.inf
POSITIVE = "must be greater than 0 and finite", lambda v: 0 < v < math.inf
BELOW_1 = "must be in [0, 1)", lambda v: 0 <= v < 1
OPACITIES = "must be numbers in [0, 1]", lambda v: v and all(0 <= each <= 1 for each in v)
BLACK_WHITE = (
    "must be two numbers, the value of black and the greater value of white",
    lambda v: len(v) == 2 and v[0] < v[1],
)


def one_of(*choices: str):
    return f"must be one of {', '.join(choices)}", lambda v: v in choices


def setting(group: str, help: str, default=None, rule=None):
    """A field with its heading and text in `--help`, its default and a rule such as `POSITIVE`."""
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
        "use this folder instead of dataset_name: it holds images, or train*.parquet and optionally test*.parquet"
    )
    resolution: int | None = _data(
        "scale the shorter side to this many pixels and crop the centre; default: keep the size", rule=AT_LEAST_1
    )
    channels: int | None = _data(
        "1 gray, 2 gray and alpha, 3 RGB, 4 RGBA, or more; default: those of the first image", rule=AT_LEAST_1
    )
    value_range: list[float] | None = _data(
        "the pixel values of black and white; required for images of more than 8 bits", rule=BLACK_WHITE
    )
    background: list[float] | None = _data(
        "blend transparent images with this colour: one number or one per colour, 0 (black) to 1", rule=OPACITIES
    )
    max_bad_fraction: float = _data("raise an error if more than this fraction of the images is broken", 0.01, BELOW_1)
    streaming: bool = _data("read and decode the images during training instead of keeping them", False)
    dataloader_num_workers: int = _data("processes that decode images; 0: the training process does", 0, AT_LEAST_0)
    seed: int = setting("optimisation", "seed of weights, order of the data, noise and samples", 0, (
        "must be in [0, 2^63 - 1]", lambda v: 0 <= v < 2**63))  # fmt: skip
    output_dir: str = setting("run", "folder for the results; it must not contain the images", ".")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            self._check_type(f)
            value, rule = getattr(self, f.name), f.metadata["rule"]
            if rule is not None and value is not None:
                self._check(f.name, rule[1](value), rule[0])

    @classmethod
    def from_json(cls, path: str | Path, **changes) -> "DataConfig":
        """Read the data settings in a train_config.json and replace some with `changes`."""
        saved = read_yaml(path, "train_config")
        names = {f.name for f in dataclasses.fields(DataConfig)}
        return cls(**{name: value for name, value in saved.items() if name in names} | changes)

    def _check_type(self, f: dataclasses.Field) -> None:
        value = getattr(self, f.name)
        options = [typing.get_origin(option) or option for option in typing.get_args(f.type) or (f.type,)]
        if float in options and type(value) is int:
            setattr(self, f.name, float(value))
        elif type(value) not in options:
            wanted = " or ".join("null" if o is types.NoneType else o.__name__ for o in options)
            self._check(f.name, False, f"must be {wanted}")
        elif type(value) is list:
            self._check(f.name, all(type(v) in (int, float) for v in value), "must hold numbers")

    def _check(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} {rule}")
