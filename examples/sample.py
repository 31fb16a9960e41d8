"""What a trained model is good for besides samples: a film, images between images, variations, repairs.

`ddpm-hf train` makes a model of digits, and `python examples/sample.py runs/digits` writes film.gif, trajectory.png,
interpolation.png, variations.png and inpainting.png. With --class_label it works for a model of classes too.
"""

import argparse

import torch

from ddpm_hf import DDPMCustomPipeline
from ddpm_hf.utils.pictures import Film, grid
from ddpm_hf.utils.seeds import image_generators

parser = argparse.ArgumentParser()
parser.add_argument("model", help="folder or Hub id")
parser.add_argument("--class_label", help="of a model of classes")
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

pipe = DDPMCustomPipeline.from_pretrained(args.model)
classes = {"class_labels": args.class_label} if args.class_label else {}
settings = {"output_type": "pt", "num_inference_steps": args.steps, **classes}


def save(rows, path, title):
    """`rows`: {name: images (columns, C, H, W) in [0, 1]}."""
    images = torch.cat(list(rows.values())).permute(0, 2, 3, 1).cpu().numpy()
    grid(images, len(images) // len(rows), title=title, row_names=list(rows)).save(path)
    print(path)


film = Film({*range(0, args.steps, max(1, args.steps // 10)), args.steps - 1})
images = pipe(9, image_generators(0, range(9)), callback_on_step_end=film, **settings).images
film.save("film.gif", of="pred_original_samples")
film.contact_sheet().save("trajectory.png")
print("film.gif", "trajectory.png", sep="\n")

a, b, T = images[0], images[1], pipe.scheduler.config.num_train_timesteps
between = [pipe.interpolate(a, b, T // 2, generator=torch.Generator().manual_seed(0), **settings).images]
between += [pipe.interpolate(method="slerp", generator=torch.Generator().manual_seed(0), **settings).images]
between += [pipe.interpolate(a, b, method="inversion", **settings).images]
names = [f"mixed at t = {T // 2}", "arc of noise", "arc of inverted noise"]
save(dict(zip(names, between)), "interpolation.png", "from one image to another, by three methods")

rows = {"image": images}
for strength in (0.2, 0.4, 0.6):
    again = pipe(image=images, strength=strength, generator=image_generators(1, range(9)), **settings).images
    rows[f"strength {strength:g}"] = again
save(rows, "variations.png", "images, and samples that keep ever less of them")

mask = torch.zeros(images.shape[2:], dtype=torch.bool)
mask[:, images.shape[3] // 2 :] = True  # the right half is to be painted
repaired = [pipe.inpaint(images, mask, jump_length=5, num_resamples=5, **settings).images for _ in range(3)]
rows = {"image": images, "right half removed": torch.where(mask, 0.5, images)}
rows |= {f"repair {k + 1}": each for k, each in enumerate(repaired)}
save(rows, "inpainting.png", "images whose right half is painted anew")
