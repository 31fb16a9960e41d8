"""`DataConfig`: the settings that say where images are and how they are read."""

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_hf.utils.yaml_files import read_yaml

EMBEDDED_DIGITS = "digits"

# What a setting must hold beside its type, in words and as a test. None, where a setting may be None, passes.
AT_LEAST_1 = "must be at least 1", lambda v: v >= 1
AT_LEAST_0 = "must be at least 0 and finite", lambda v: 0 <= v < math.inf
POSITIVE = "must be greater than 0 and finite", lambda v: 0 < v < math.inf
BELOW_1 = "must lie in [0, 1)", lambda v: 0 <= v < 1
OPACITIES = "must lie in 0 ... 1", lambda v: v and all(0 <= each <= 1 for each in v)
BLACK_WHITE = (
    "must be two numbers, the value of black and the greater value of white",
    lambda v: len(v) == 2 and v[0] < v[1],
)


def one_of(*choices: str):
    return f"must be one of {', '.join(choices)}", lambda v: v in choices


def setting(group: str, help: str, default=None, rule=None):
    """A field of a configuration: its heading in `--help`, its help text, its default and a rule such as `POSITIVE`."""
    metadata = {"group": group, "help": help, "rule": rule}
    return (
        field(default_factory=dict, metadata=metadata) if default == {} else field(default=default, metadata=metadata)
    )


_data = functools.partial(setting, "data")


@dataclass
class DataConfig:
    """What `data`, `sources` and `streaming` read. A wrong value is a ValueError that says what would be right."""

    dataset_name: str | None = _data(
        "`digits`, the 1,797 real 8x8 digits that come with scikit-learn, or a data set of the Hub", EMBEDDED_DIGITS
    )
    dataset_config_name: str | None = _data("configuration of the data set of the Hub")
    train_data_dir: str | None = _data(
        "in place of dataset_name: a folder of images, or one that holds train*.parquet (test*.parquet is held out)"
    )
    resolution: int | None = _data(
        "scale the shorter side to this and crop the middle; default: as they are", rule=AT_LEAST_1
    )
    channels: int | None = _data(
        "1 gray, 2 with alpha, 3 RGB, 4 RGBA, or as many as arrays have; default: as the first", rule=AT_LEAST_1
    )
    value_range: list[float] | None = _data(
        "values of black and white in images of more than 8 bits; needed there", rule=BLACK_WHITE
    )
    background: list[float] | None = _data(
        "what to put under transparent images: 0 (black) ... 1 (white), one number or one a colour", rule=OPACITIES
    )
    max_bad_fraction: float = _data("stop if more than this share of the images can't be read", 0.01, BELOW_1)
    streaming: bool = _data("read a data set of the Hub, or train*.parquet, while training, and keep none of it", False)
    dataloader_num_workers: int = _data("processes that decode the images; 0: the training process", 0, AT_LEAST_0)
    seed: int = setting("optimisation", "of weights, order of the data, noise, timesteps and samples", 0, (
        "must lie in 0 ... 2^63 - 1", lambda v: 0 <= v < 2**63))  # fmt: skip
    output_dir: str = setting("run", "where results are written, which must not be a folder of the images", ".")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            self._check_type(f)
            value, rule = getattr(self, f.name), f.metadata["rule"]
            if rule is not None and value is not None:
                self._check(f.name, rule[1](value), rule[0])

    @classmethod
    def from_json(cls, path: str | Path, **changes) -> "DataConfig":
        """The data settings in a train_config.json, whose other keys are ignored, with `changes` in their place."""
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
