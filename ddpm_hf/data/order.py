"""The order in which a run sees its images: a function of (seed, position) alone.

So resumed runs, several processes and batches of other sizes need no other state.
"""

from functools import lru_cache

import numpy as np
import torch

from ddpm_hf.utils.seeds import seeded_generator


class Order:
    """An endless sequence of images, in epochs of N positions.

    Args:
        num_images: N.
        labels: the classes of the images, (N,), -1 for no class, which counts as one more class; None: no classes.
        balance: 0: each epoch has every image once. Otherwise a class of n images has a share of each epoch that is
            proportional to n^(1 - balance), rounded to whole images, so 1 gives all classes the same. All images of a
            class are seen equally often: in an epoch their counts differ by 1 at most.
    """

    def __init__(self, num_images: int, labels: torch.Tensor | None = None, balance: float = 0.0):
        self.num_images, self.classes = num_images, []
        if balance:
            members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
            self.classes = list(zip(members, _shares([len(each) for each in members], balance), strict=True))

    def indices(self, seed: int, step: int, batch_size: int) -> torch.Tensor:
        """Indices (batch_size,) of the images in the global batch of update `step`."""
        positions = torch.arange(step * batch_size, (step + 1) * batch_size)
        epochs = positions // self.num_images
        order = torch.cat([_epoch(self, seed, epoch) for epoch in epochs.unique().tolist()])
        return order[positions - epochs[0] * self.num_images]


@lru_cache(maxsize=4)
def _epoch(order: Order, seed: int, epoch: int) -> torch.Tensor:
    shuffled = torch.randperm(order.num_images, generator=seeded_generator(seed, "order", epoch))
    if not order.classes:
        return shuffled
    pool = []
    for number, (members, share) in enumerate(order.classes):
        n, (often, rest) = len(members), divmod(share, len(members))
        pool.append(members.repeat(often))
        if rest:  # the next ones of an endless sequence of permutations
            start = epoch * rest
            cycles = range(start // n, (start + rest - 1) // n + 1)
            shuffles = [torch.randperm(n, generator=seeded_generator(seed, "class", number, each)) for each in cycles]
            pool.append(members[torch.cat(shuffles)[start - cycles[0] * n :][:rest]])
    return torch.cat(pool)[shuffled]


def _shares(sizes: list[int], balance: float) -> list[int]:
    """The number of images of each class in an epoch, at least 1 each, which together are all images."""
    weights = np.float64(sizes) ** (1 - balance)
    exact = sum(sizes) * weights / weights.sum()
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: sum(sizes) - shares.sum()]] += 1
    return shares.tolist()
