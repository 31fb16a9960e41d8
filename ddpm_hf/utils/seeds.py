"""Random numbers that depend only on a seed, a purpose and indices, and not on earlier draws."""

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, *indices: int) -> int:
    """A seed in 0 ... 2^63 - 1 that differs for every seed, purpose and indices."""
    words = np.random.SeedSequence([seed, *indices, *purpose.encode()]).generate_state(2)
    return int(words[0]) << 31 ^ int(words[1])


def seeded_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A generator with the seed `stream_seed(seed, purpose, *indices)`."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, *indices))


def image_generators(seed: int, numbers) -> list[torch.Generator]:
    """One generator per sample: sample k of `seed` has the same noise in every batch and process."""
    return [seeded_generator(seed, "sample", k) for k in numbers]
