"""What guidance does: a row a class, from none of it (any class) to far too much.

`ddpm-hf train --config digits-classes` makes a model in 135 seconds, and `python examples/guidance.py
runs/digits-classes` a picture of it, guidance.png. All images of a row begin with the same noise.
"""

import argparse

import numpy as np
import torch

from ddpm_hf import DDPMCustomPipeline
from ddpm_hf.utils.pictures import grid

parser = argparse.ArgumentParser()
parser.add_argument("model", help="folder or Hub id of a class-conditional model")
parser.add_argument("--scales", type=float, nargs="+", default=[0, 1, 2, 3, 4, 5, 6, 7, 8])
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--output", default="guidance.png")
args = parser.parse_args()

pipeline = DDPMCustomPipeline.from_pretrained(args.model)
names = pipeline.unet.config.class_names
if names is None:
    parser.error(f"{args.model} is unconditional: train one with --class_conditional")
columns = []
for scale in args.scales:
    generators = [torch.Generator().manual_seed(row) for row in range(len(names))]
    images = pipeline(
        class_labels=names,  # one image a class
        guidance_scale=scale,  # 1 is the class as it is, 0 any class
        generator=generators,
        num_inference_steps=args.steps,
        output_type="np",
    ).images  # (classes, H, W, C)
    columns.append(images)

rows = np.stack(columns, axis=1)  # (classes, scales, H, W, C)
grid(
    rows.reshape(-1, *rows.shape[2:]),
    len(columns),
    title="samples by class (rows) and guidance scale (columns)",
    column_names=[f"{scale:g}" for scale in args.scales],
    row_names=names,
).save(args.output)
print(args.output)
