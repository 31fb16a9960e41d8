"""What `convert` needs to know of a tutorial's code, of which each source here is one."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Weights = dict[str, torch.Tensor]


@dataclass
class Source:
    """One tutorial's code.

    Args:
        signature: a key that its checkpoints have and no other source's.
        sizes: weights -> what they determine, under the source's own names.
        defaults: the source's values of what weights do not determine.
        settings: sizes -> arguments of `DDPMUNet`.
        names: sizes -> [(pattern of its keys, our key)], the first match counts; `None` for a weight that its network
            never uses.
        scheduler: sizes -> how the source samples, as arguments of `LinearNoiseScheduler`.
        never_read: names in its configuration that its code does not look at.
        aliases: other names that its own code has for a size.
        notes: what its sampler does and ours does not.
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
    """How many different numbers the first group of `pattern` takes among the keys."""
    return len({match[1] for key in weights if (match := re.match(pattern, key))})
