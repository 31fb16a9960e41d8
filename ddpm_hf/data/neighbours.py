"""Nearest neighbours in Euclidean distance, of features and of images, without an N x N matrix in memory."""

import torch

from ddpm_hf.data.dataset import ImageData

BLOCK = 2**23  # numbers in memory at a time: 32 MiB of float32


def nearest(queries: torch.Tensor, references, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k references nearest to each query, or all references if there are fewer.

    Matrix products find them. Their distances are then recomputed from differences, so an exact copy has distance 0.

    Args:
        queries: (M, D), in the dtype of the references.
        references: (N, D), or an object of length N whose item at indices (n,) is the rows (n, D).

    Returns:
        Indices of references and distances, (M, k) each, nearest first.
    """
    center = queries.mean(0)  # squares lose fewer digits if the rows are near 0
    centered = queries - center
    best = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.long)
    for numbers in torch.arange(len(references)).split(max(1, BLOCK // max(queries.shape))):
        rows = references[numbers] - center
        # Squared distances (M, n), without the query's own square, which does not change the order
        distances = torch.addmm(rows.square().sum(1), centered, rows.T, alpha=-2)
        distances, order = torch.cat([best, distances], 1).topk(min(k, best.shape[1] + len(numbers)), largest=False)
        indices = torch.cat([indices, numbers.expand(len(queries), -1)], 1).gather(1, order)
        best = distances
    exact = torch.stack([(queries - references[column]).norm(dim=1) for column in indices.T], 1)
    exact, order = exact.sort(dim=1, stable=True)
    return indices.gather(1, order), exact


def nearest_images(samples: torch.Tensor, images: ImageData, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k images nearest to each sample by their pixels in [-1, 1], or all images if there are fewer.

    Args:
        samples: (B, C, H, W) in [-1, 1].

    Returns:
        The images (B, k, C, H, W) in [-1, 1] and their distances (B, k), nearest first.
    """
    indices, distances = nearest(samples.flatten(1), _Flattened(images), k)
    return images.batch(indices.flatten()).unflatten(0, indices.shape), distances


class _Flattened:
    """Images as rows of C * H * W pixels in [-1, 1], computed on access."""

    def __init__(self, images: ImageData):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        return self.images.batch(indices).flatten(1)
