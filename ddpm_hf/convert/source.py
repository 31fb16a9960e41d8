"""The description of a tutorial's code from which `convert` converts its checkpoints."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Weights = dict[str, torch.Tensor]


@dataclass
class Source:
    """One tutorial.

    Args:
        signature: a key that only checkpoints of this source have.
        sizes: weights -> the settings that they determine, under the names of the source.
        defaults: values for settings that the weights do not determine.
        settings: sizes -> arguments of `DDPMUNet`.
        names: sizes -> [(pattern of a source key, key of `DDPMUNet`)]; the first match counts. `None` marks weights
            that the source does not use.
        scheduler: sizes -> arguments of `LinearNoiseScheduler`.
        never_read: settings in its configuration files that its code does not use.
        aliases: alternative name of a size -> its name in `sizes`.
        notes: differences between its sampler and that of this package.
    """

    signature: str
    sizes: Callable[[Weights], dict]
    defaults: dict
    settings: Callable[[dict], dict]
    names: Callable[[dict], list]
    scheduler: Callable[[dict], dict]
    never_read: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def count(weights: Weights, pattern: str) -> int:
    """The number of different values that the first group of `pattern` has in the keys."""
    return len({match[1] for key in weights if (match := re.match(pattern, key))})
