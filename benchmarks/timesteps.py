"""What spreading the timesteps of a batch evenly takes off the variance: `python benchmarks/timesteps.py MODEL`.

MODEL is the folder of a finished run of `--config digits`. Many batches of the recipe's size are drawn, each with other
images, noise and timesteps, once with timesteps drawn one by one and once antithetic; what the loss and the gradient of
the network's weights vary between batches is compared.
"""

import sys
from pathlib import Path

import torch

from ddpm_hf import DDPMCustomPipeline
from ddpm_hf.data.dataset import load_images
from ddpm_hf.training import Batch, DenoisingLoss
from ddpm_hf.training.batch import draw_random
from ddpm_hf.training.config import resolve

BATCHES, BATCHES_OF_GRADIENT = 1000, 300


def main(model: Path) -> None:
    pipeline = DDPMCustomPipeline.from_pretrained(model)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    weights = list(unet.parameters())
    variances = {}
    for antithetic in (False, True):
        config = resolve({"config": "digits", "antithetic_timesteps": antithetic})
        images, B = load_images(config)[0], config.train_batch_size
        losses, mean, square = [], 0.0, 0.0
        for step in range(BATCHES):
            drawn = draw_random(config, step, torch.arange(B), B, images.shape)
            batch, _ = images.batch_for_step(config.seed, step, B, torch.arange(B))
            with_gradient = step < BATCHES_OF_GRADIENT
            with torch.set_grad_enabled(with_gradient):
                loss = DenoisingLoss()(unet, scheduler, Batch(batch, drawn.noise, drawn.uniform)).loss.mean()
            losses.append(loss.item())
            if with_gradient:
                gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).double()
                mean, square = mean + gradient, square + gradient.square()
        n = BATCHES_OF_GRADIENT
        of_gradient = ((square - mean.square() / n) / (n - 1)).sum().item()  # trace of the covariance
        variances[antithetic] = (torch.tensor(losses).double().var().item(), of_gradient)
    print(f"batches of {B}; {BATCHES} for the loss, {BATCHES_OF_GRADIENT} for the gradient")
    for k, what in enumerate(("loss", "gradient (trace of its covariance)")):
        plain, even = variances[False][k], variances[True][k]
        print(f"variance of the {what}: {plain:.3e} one by one, {even:.3e} antithetic: {plain / even:.2f} times less")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
