"""Random numbers that are a function of a seed, a purpose and an index: never of what was drawn before."""

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, index: int) -> int:
    """A seed in 0 ... 2^63 - 1 that depends on all three and that no other purpose or index shares."""
    words = np.random.SeedSequence([seed, index, *purpose.encode()]).generate_state(2)
    return int(words[0]) << 31 ^ int(words[1])


def seeded_generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A generator of that seed."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, index))


def image_generators(seed: int, numbers) -> list[torch.Generator]:
    """One a sample: sample k has the same noise in every batch, process and picture of `seed`."""
    return [seeded_generator(seed, "sample", k) for k in numbers]
