"""Train the network behind `--features digits` and write its weights, half a minute on one core.

    python benchmarks/digits_features.py ddpm_hf/digits_features.safetensors

Other machines round otherwise, so another run gives slightly other weights; the ones in the package are the reference.
"""

import sys

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ddpm_hf.data.dataset import load_images
from ddpm_hf.evaluation.features.networks import DigitsNet
from ddpm_hf.training.config import TrainConfig

EPOCHS, BATCH, LR = 60, 64, 3e-3


def moved(images: torch.Tensor) -> torch.Tensor:
    """Each turned by up to 10 degrees and moved by up to 0.6 pixels."""
    angle = (torch.rand(len(images)) * 2 - 1) * 0.17
    shift = (torch.rand(len(images), 2) * 2 - 1) * 0.15  # of the half width, 4 pixels
    rows = [torch.stack([angle.cos(), -angle.sin(), shift[:, 0]], 1)]
    rows += [torch.stack([angle.sin(), angle.cos(), shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def main(path: str) -> None:
    torch.manual_seed(0)
    train, held_out = load_images(TrainConfig())
    images, labels = (train.batch(torch.arange(len(train))) + 1) / 2, train.labels
    unseen = (held_out.batch(torch.arange(len(held_out))) + 1) / 2
    network = DigitsNet().train()
    optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=0.05)
    updates = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=updates)
    for _ in range(updates):
        some = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(network(moved(images[some]))[1], labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    save_file({name: value.half() for name, value in network.state_dict().items()}, path)
    for name, part, truth in (("training", images, labels), ("held-out", unseen, held_out.labels)):
        features, logits = network(part)
        accuracy = (logits.argmax(1) == truth).float().mean()
        print(f"{name}: {accuracy:.2%} of {len(part)} are read rightly; {(features.var(0) == 0).sum()} dead features")


if __name__ == "__main__":
    main(*sys.argv[1:])
