"""The whole of DDPM training and sampling (Ho et al. 2020, algorithms 1 and 2) in 40 lines, on 8x8 digits.

`python examples/minimal_loop.py` takes about two minutes and writes minimal_loop.png. What a real run needs besides
(EMA weights, checkpoints, a learning-rate schedule, a held-out loss) is in ddpm_hf/training.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from ddpm_hf import DDPMCustomPipeline, DDPMUNet, LinearNoiseScheduler
from ddpm_hf.utils.pictures import grid

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--output", default="minimal_loop.png")
args = parser.parse_args()
torch.manual_seed(0)

images = torch.tensor(load_digits().images[:, None], dtype=torch.float32) / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]
unet = DDPMUNet(
    sample_size=8, block_out_channels=(32, 64), mid_block_out_channels=(64,), up_block_out_channels=(32, 32),
    layers_per_block=1, mid_layers_per_block=1,
)  # fmt: skip
scheduler = LinearNoiseScheduler()
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)

for step in range(args.steps):
    clean = images[torch.randint(len(images), (64,))]  # x_0 ~ q(x_0)
    timesteps = torch.randint(len(scheduler), (64,))  # t ~ Uniform
    noise = torch.randn_like(clean)  # epsilon ~ N(0, I)
    noisy = scheduler.add_noise(clean, noise, timesteps)  # x_t
    loss = F.mse_loss(unet(noisy, timesteps).sample, noise)  # ||epsilon - epsilon_theta(x_t, t)||^2
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"update {step}: loss {loss.item():.4f}")

pipeline = DDPMCustomPipeline(unet.eval(), scheduler)
samples = pipeline(64, torch.Generator().manual_seed(0), num_inference_steps=100, output_type="np").images
grid(samples, columns=8).save(args.output)
print(args.output)
