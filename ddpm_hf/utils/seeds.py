"""Random numbers that are a function of a seed, a purpose and an index: never of what was drawn before."""

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, *indices: int) -> int:
    """A seed in 0 ... 2^63 - 1 that depends on all of them, and that no other purpose or indices share."""
    words = np.random.SeedSequence([seed, *indices, *purpose.encode()]).generate_state(2)
    return int(words[0]) << 31 ^ int(words[1])


def seeded_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A generator with the seed `stream_seed(seed, purpose, *indices)`."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, *indices))


def image_generators(seed: int, numbers) -> list[torch.Generator]:
    """One a sample: sample k has the same noise in every batch, process and picture of `seed`."""
    return [seeded_generator(seed, "sample", k) for k in numbers]
