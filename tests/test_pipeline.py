import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_unet
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf import CosineNoiseScheduler, DDPMCustomPipeline, DDPMUNet, LinearNoiseScheduler
from ddpm_hf.data.dataset import load_images
from ddpm_hf.pipelines.editing import repaint_moves, slerp
from ddpm_hf.schedulers.solvers import SOLVERS
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.utils.pictures import Film
from ddpm_hf.utils.seeds import image_generators


def tiny_pipeline(**settings) -> DDPMCustomPipeline:
    pipeline = DDPMCustomPipeline(tiny_unet(**settings), LinearNoiseScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_output_types():
    pipeline = tiny_pipeline(in_channels=3, sample_size=(8, 12))
    made = {kind: pipeline(2, seeded(0), 3, output_type=kind).images for kind in ("latent", "pt", "np", "pil")}
    assert made["latent"].shape == (2, 3, 8, 12)
    assert_close(made["pt"], (made["latent"] / 2 + 0.5).clamp(0, 1))
    assert_close(torch.from_numpy(made["np"]), made["pt"].permute(0, 2, 3, 1))
    assert [image.size for image in made["pil"]] == [(12, 8)] * 2
    assert np.array_equal(np.stack(made["pil"]), (made["np"] * 255).round().astype(np.uint8))
    assert pipeline(2, seeded(0), 3, output_type="pt", return_dict=False)[0].equal(made["pt"])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pil_modes(channels, mode):
    assert tiny_pipeline(in_channels=channels)(1, seeded(0), 2).images[0].mode == mode


def test_other_channels_are_arrays():
    pipeline = tiny_pipeline(in_channels=5)
    assert pipeline(1, seeded(0), 2, output_type="np").images.shape == (1, 8, 8, 5)
    with pytest.raises(ValueError, match="output_type='pil' needs gray or RGB, perhaps with alpha, not 5 bands"):
        pipeline(1)


def test_an_image_with_its_own_generator_does_not_depend_on_the_batch():
    pipeline = tiny_pipeline()
    together = pipeline(3, [seeded(s) for s in (5, 6, 7)], 10, output_type="pt").images
    alone = pipeline(1, [seeded(6)], 10, output_type="pt").images
    assert_close(together[1:2], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(together[:1], alone, atol=1e-2)


def test_all_timesteps_by_default():
    pipeline = tiny_pipeline()
    pipeline.scheduler = LinearNoiseScheduler(7)
    seen = []
    pipeline(1, callback_on_step_end=lambda pipe, i, t, tensors: seen.append((i, int(t))))
    assert seen == list(enumerate(range(6, -1, -1)))


def test_a_callback_can_replace_the_sample():
    pipeline = tiny_pipeline()
    images = pipeline(1, seeded(0), 5, "latent", callback_on_step_end=lambda *_: {"sample": torch.ones(1, 1, 8, 8)})
    assert_close(images.images, torch.ones(1, 1, 8, 8))


def test_a_network_in_bf16_samples_nearly_the_same():
    pipeline = tiny_pipeline()
    expected = pipeline(2, seeded(0), 10, "pt").images
    got = pipeline.to(torch.bfloat16)(2, seeded(0), 10, "pt").images
    assert got.dtype == torch.float32
    assert_close(got, expected, rtol=0, atol=0.1)


OF_DIFFUSERS = ["DDIM", "DDPM", "PNDM", "DEISMultistep", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete",
           "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "SASolver"]  # fmt: skip


@pytest.mark.parametrize("name", OF_DIFFUSERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_any_solver_of_diffusers_samples_gaussian_data(name):
    """With the optimal network for N(0, 1), every solver samples from about N(0, 1)."""

    unet = tiny_unet()
    abar = LinearNoiseScheduler().alphas_cumprod

    def optimal(sample, timestep, return_dict=True):
        return type("Output", (), {"sample": (1 - abar[int(timestep)]).sqrt() * sample})

    unet.forward = optimal
    solver = getattr(diffusers, f"{name}Scheduler").from_config(LinearNoiseScheduler(clip_sample=False).config)
    pipeline = DDPMCustomPipeline(unet, solver)
    pipeline.set_progress_bar_config(disable=True)
    sample = pipeline(200, seeded(0), 20, output_type="latent").images
    assert 0.6 < sample.var() < 1.2
    assert abs(sample.mean()) < 0.05


# ---------------------------------------------------------------- classes


def of_classes(**settings) -> DDPMCustomPipeline:
    pipeline = tiny_pipeline(num_classes=3, class_names=["cat", "dog", "7"], **settings)
    pipeline.unet.class_embedding.weight.data *= 3  # so that the classes of an untrained network differ
    return pipeline


def test_labels_may_be_numbers_or_names_and_one_or_many():
    pipeline = of_classes()
    settings = {"num_inference_steps": 3, "output_type": "pt"}
    generators = [seeded(0) for _ in range(4)]
    expected = pipeline(4, generators, class_labels=[1, 1, 2, 0], **settings).images
    for a, b in ((0, 2), (0, 3), (2, 3)):
        assert not torch.allclose(expected[a], expected[b], atol=1e-3)
    same = [
        ["dog", "dog", "7", "cat"],
        torch.tensor([1, 1, 2, 0]),
        np.array([1, 1, 2, 0]),
        ("dog", np.int64(1), 2, "cat"),
    ]
    for labels in same:
        generators = [seeded(0) for _ in range(4)]
        assert_close(pipeline(None, generators, class_labels=labels, **settings).images, expected, rtol=0, atol=0)
    for label in ("dog", 1, torch.tensor(1), np.int64(1)):
        two = pipeline(2, [seeded(0), seeded(0)], class_labels=label, **settings).images
        assert_close(two, expected[:2], rtol=0, atol=1e-5)
        assert pipeline(generator=seeded(0), class_labels=label, **settings).images.shape == (1, 1, 8, 8)


def test_an_index_that_is_the_name_of_another_class_is_an_error():
    """Classes "1", "2", "3": is 1 the first or the second?"""
    pipeline = tiny_pipeline(num_classes=3, class_names=["1", "2", "3"])
    settings = {"num_inference_steps": 1, "output_type": "pt"}
    with pytest.raises(ValueError, match=r"class_labels=\[1, 2\]: 1 is the index of one class and the name of another"):
        pipeline(class_labels=[1, 2], **settings)
    named = pipeline(generator=seeded(0), class_labels=["2", "3"], **settings).images
    for indices in (torch.tensor([1, 2]), np.array([1, 2])):
        assert_close(pipeline(generator=seeded(0), class_labels=indices, **settings).images, named)
    same = tiny_pipeline(num_classes=3, class_names=["0", "1", "2"])
    assert len(same(class_labels=[1, 2], **settings).images) == 2  # names that are the indices


def test_guidance_is_one_batch_of_both():
    pipeline, seen = of_classes(), []
    pipeline.unet.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((len(args[0]), kwargs["class_labels"].tolist())), with_kwargs=True
    )
    for scale in (1, 0, np.float32(2.5)):
        pipeline(class_labels=[0, 2], guidance_scale=scale, num_inference_steps=2, generator=seeded(0))
    assert seen == [(2, [0, 2])] * 2 + [(4, [0, 2, 3, 3])] * 4


CLASS_MEANS, VARIANCE = (-0.6, 0.1, 0.9, 0.0), 0.09  # of the data of each class, and of the null label


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("kind", [LinearNoiseScheduler, CosineNoiseScheduler])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_is_right_for_every_prediction_type(prediction_type, clip_sample, kind, scale):
    """With perfect networks for Gaussian classes, against the mixture of x_0 and the posterior written out here."""
    scheduler = kind(prediction_type=prediction_type, clip_sample=clip_sample)
    abar, means, size, steps = scheduler.alphas_cumprod_float64, torch.tensor(CLASS_MEANS).double(), (3, 1, 8, 8), 20

    def optimal_x0(x, t, labels):
        mean = means[labels].reshape(-1, 1, 1, 1)
        gain = abar[t].sqrt() * VARIANCE / (abar[t] * VARIANCE + 1 - abar[t])
        return mean + gain * (x - abar[t].sqrt() * mean)

    def perfect(sample, timestep, class_labels):
        t, x = int(timestep), sample
        x0 = optimal_x0(x, t, class_labels)
        epsilon = (x - abar[t].sqrt() * x0) / (1 - abar[t]).sqrt()
        output = {"epsilon": epsilon, "sample": x0, "v_prediction": scheduler.get_velocity(x0, epsilon, t)}
        return type("Output", (), {"sample": output[prediction_type]})

    pipeline = DDPMCustomPipeline(tiny_unet(num_classes=3).double(), scheduler)
    pipeline.unet.forward = perfect
    pipeline.set_progress_bar_config(disable=True)
    got = pipeline(3, seeded(0), steps, "latent", class_labels=[2, 0, 1], guidance_scale=scale).images

    generator, labels, none = seeded(0), torch.tensor([2, 0, 1]), torch.tensor([3, 3, 3])
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    for t in range(1000 - 1000 // steps, -1, -1000 // steps):
        before = abar[t - 1000 // steps] if t else torch.tensor(1.0).double()
        without = optimal_x0(x, t, none)
        x0 = without + scale * (optimal_x0(x, t, labels) - without)
        x0 = x0.clamp(-1, 1) if clip_sample else x0
        beta = 1 - abar[t] / before
        x = (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x) / (1 - abar[t])
        if t:
            noise = torch.randn(size, generator=generator, dtype=torch.float64)
            x = x + (beta * (1 - before) / (1 - abar[t])).sqrt() * noise
    assert_close(got, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "class_labels=None: this model is class-conditional; choose from labels 0 ... 2 or names cat, dog, 7"),
        ({"class_labels": 3}, "class_labels=3: 3 is not a class; choose from labels 0 ... 2 or names cat, dog, 7"),
        ({"class_labels": [0, -1]}, "-1 is not a class"),
        (
            {"class_labels": "mouse"},
            "class_labels='mouse': 'mouse' is not a class; choose from labels 0 ... 2 or",
        ),
        ({"class_labels": 1.0}, "1.0 is not a class"),
        ({"class_labels": True}, "True is not a class"),
        ({"class_labels": range(4)}, "3 is not a class"),
        ({"class_labels": []}, "class_labels has 0 labels for batch_size=None"),
        (
            {"class_labels": [0, 1], "batch_size": 3},
            "class_labels has 2 labels for batch_size=3; give one",
        ),
        ({"class_labels": 0, "guidance_scale": -1}, "guidance_scale=-1 must be a finite number of at least 0"),
        ({"class_labels": 0, "guidance_scale": "2"}, "guidance_scale='2' must be a finite number of at least 0"),
        (
            {"class_labels": 0, "guidance_scale": float("nan")},
            "guidance_scale=nan must be a finite number of at least 0",
        ),
    ],
)
def test_invalid_classes(call, message):
    with pytest.raises(ValueError, match=message):
        of_classes()(num_inference_steps=2, **call)


def test_an_unconditional_model_takes_no_classes():
    for call in ({"class_labels": [0]}, {"guidance_scale": 2.0}):
        with pytest.raises(ValueError, match=rf"{next(iter(call))}=.*: this model is unconditional, so it must be"):
            tiny_pipeline()(num_inference_steps=2, **call)


# ---------------------------------------------------------------- saving and loading


def test_a_folder_saved_before_there_were_classes_loads_and_samples_as_it_did():
    """Saved, with what it sampled, by version 0.1.0 of 2026-11-22."""
    folder = Path(__file__).parent / "unconditional_pipeline"
    assert "num_classes" not in (folder / "unet/config.json").read_text()
    pipeline = DDPMCustomPipeline.from_pretrained(folder)
    images = pipeline(2, seeded(0), 10, output_type="np").images
    assert_close(images, np.load(folder / "samples.npy"), rtol=0, atol=1e-5)


LOAD_AND_SAMPLE = """
import sys, torch, numpy
from ddpm_hf import DDPMCustomPipeline
pipeline = DDPMCustomPipeline.from_pretrained(sys.argv[1])
images = pipeline(2, torch.Generator().manual_seed(0), 10, output_type="np").images
numpy.save(sys.argv[2], images)
"""


def test_a_saved_pipeline_samples_equally_in_a_new_process(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    assert index["_class_name"] == "DDPMCustomPipeline"
    assert index["unet"] == ["ddpm_hf", "DDPMUNet"]
    assert index["scheduler"] == ["ddpm_hf", "LinearNoiseScheduler"]
    out = tmp_path / "images.npy"
    subprocess.run([sys.executable, "-c", LOAD_AND_SAMPLE, tmp_path / "model", out], check=True, cwd=tmp_path)
    expected = pipeline(2, seeded(0), 10, output_type="np").images
    assert_close(np.load(out), expected, rtol=0, atol=1e-5)


def test_the_stock_loaders_find_our_classes(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is DDPMCustomPipeline
    assert type(diffusers.AutoModel.from_pretrained(str(tmp_path), subfolder="unet")) is DDPMUNet
    assert type(DDPMCustomPipeline.from_pipe(loaded)) is DDPMCustomPipeline
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    assert "ddpm_hf" in LOADABLE_CLASSES  # private API of diffusers


def test_our_network_runs_in_diffusers_own_pipelines():
    unet = tiny_unet()
    scheduler = LinearNoiseScheduler()
    theirs = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler.from_config(scheduler.config))
    ours = DDPMCustomPipeline(unet, scheduler)
    a, b = (pipe(2, seeded(0), num_inference_steps=10, output_type="np").images for pipe in (theirs, ours))
    assert_close(a, b, rtol=0, atol=1e-4)
    theirs = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler.from_config(scheduler.config))
    ours = DDPMCustomPipeline(unet, theirs.scheduler)
    a, b = (pipe(2, seeded(0), num_inference_steps=10, output_type="np").images for pipe in (theirs, ours))
    assert_close(a, b, rtol=0, atol=1e-4)
    assert diffusers.DDPMPipeline(unet, scheduler)(1, seeded(0), num_inference_steps=3, output_type="np")


def test_invalid_calls():
    pipeline = tiny_pipeline()
    for batch_size in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"batch_size={batch_size} must be an integer of at least 1"):
            pipeline(batch_size)
    for steps in (0, -3, 1001):
        with pytest.raises(ValueError, match=f"num_inference_steps={steps} must be an integer in 1 ... 1000"):
            pipeline(1, num_inference_steps=steps)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    for steps in (0, -3, 1001):  # the solver itself would return noise
        with pytest.raises(ValueError, match=f"num_inference_steps={steps} must be an integer in 1 ... 1000"):
            pipeline(1, num_inference_steps=steps)
    with pytest.raises(ValueError, match="output_type='jpg' must be one of pil, np, pt, latent"):
        pipeline(1, output_type="jpg")
    with pytest.raises(ValueError, match="generator is a list of 1 for a batch of 2; give one per image"):
        pipeline(2, [seeded(0)])


# ---------------------------------------------------------------- from images, between images, back to noise


@pytest.fixture(scope="module")
def digits(digits_model):
    """A small trained class-conditional model, 16 held-out digits (16, 1, 8, 8) in [0, 1], and their labels."""
    pipeline = DDPMCustomPipeline.from_pretrained(digits_model)
    pipeline.set_progress_bar_config(disable=True)
    held_out = load_images(TrainConfig())[1]
    return pipeline, held_out.batch(torch.arange(16)) / 2 + 0.5, held_out.labels[:16]


def distance(a, b) -> float:
    return float((a - b).square().mean().sqrt())


def test_the_more_strength_the_less_is_left_of_an_image(digits):
    pipeline, images, labels = digits
    settings = {"class_labels": labels, "num_inference_steps": 25, "output_type": "pt"}
    for solver in (None, "ddpm", *(name for name in SOLVERS if name != "pndm")):
        made = [
            pipeline(image=images, strength=s, generator=seeded(0), scheduler=solver, **settings).images
            for s in (0.04, 0.3, 1.0)
        ]
        distances = [distance(images, each) for each in made]
        assert distances == sorted(distances)
        assert distances[0] < 0.06
        assert distances[2] > 0.15


def test_images_to_begin_with_may_be_of_any_kind(digits):
    pipeline, images, labels = digits
    pixels = (images * 255).round() / 255
    as_pil = [Image.fromarray((p[0].numpy() * 255).round().astype(np.uint8)) for p in pixels]
    expected = None
    for image in (pixels, pixels.permute(0, 2, 3, 1).numpy(), as_pil, pixels.double()):
        generators = [seeded(k) for k in range(16)]
        made = pipeline(None, generators, 5, "pt", image=image, strength=0.4, class_labels=labels).images
        assert made.shape == (16, 1, 8, 8)
        expected = made if expected is None else expected
        assert_close(made, expected, rtol=0, atol=1e-4)
    for image in (as_pil[0], pixels[0], pixels[:1]):
        made = pipeline(3, generators[:3], 5, "pt", image=image, class_labels=4).images
        assert made.shape == (3, 1, 8, 8)
    wide = torch.rand(1, 1, 6, 11)
    assert pipeline(image=wide, class_labels=4, num_inference_steps=5, output_type="pt").images.shape == wide.shape


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("guided", [False, True])
def test_known_pixels_come_back_exactly(channels, guided):
    pipeline = tiny_pipeline(in_channels=channels, sample_size=(8, 12), **({"num_classes": 3} if guided else {}))
    classes = {"class_labels": [0, 2], "guidance_scale": 2.0} if guided else {}
    images = torch.rand(2, channels, 8, 12, generator=seeded(1))
    mask = torch.zeros(8, 12, dtype=torch.bool)
    mask[2:5, 3:9] = True
    settings = {"num_inference_steps": 20, "jump_length": 4, "num_resamples": 3, "generator": seeded(2), **classes}
    made = pipeline.inpaint(images, mask, output_type="latent", **settings).images
    assert torch.equal(made[..., ~mask], (images * 2 - 1)[..., ~mask])
    assert (made[..., mask] != (images * 2 - 1)[..., mask]).all()
    settings["generator"] = seeded(2)
    floats = pipeline.inpaint(images, mask, output_type="pt", **settings).images
    assert torch.equal(floats[..., ~mask], images[..., ~mask])
    covered = torch.where(mask, 0.123, images)  # masked pixels are ignored
    settings["generator"] = seeded(2)
    assert torch.equal(pipeline.inpaint(covered, mask, output_type="latent", **settings).images, made)
    if channels != 5:
        eight_bits = (images * 255).round() / 255
        made = pipeline.inpaint(eight_bits, mask, **settings).images
        pixels = np.stack(made).reshape(2, 8, 12, channels)
        known = (eight_bits * 255).round().permute(0, 2, 3, 1).numpy()
        assert np.array_equal(pixels[:, ~mask.numpy()], known[:, ~mask.numpy()])


def test_inpainting_fits_the_known_half(digits):
    """Inpainted right halves are nearer to the true ones than the right halves of other digits are."""
    pipeline, images, labels = digits
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, 4:] = True
    settings = {"num_inference_steps": 50, "jump_length": 5, "num_resamples": 4, "output_type": "pt"}
    made = pipeline.inpaint(images, mask, generator=seeded(0), class_labels=labels, **settings).images
    others = torch.stack(
        [distance(images.roll(k, 0)[..., mask], images[..., mask]) * torch.ones(()) for k in range(1, 16)]
    )
    assert distance(made[..., mask], images[..., mask]) < 0.8 * others.mean()


def test_the_moves_of_repaint():
    """Against the schedule of timesteps in the paper's appendix, whose last entry is the image."""
    for length, jump, resamples in ((250, 10, 10), (20, 4, 3), (7, 1, 2), (5, 10, 10), (3, 3, 2), (1, 1, 1)):
        jumps = dict.fromkeys(range(0, length - jump, jump), resamples - 1)
        t, visited = length, []
        while t >= 1:
            t -= 1
            visited.append(t)
            if jumps.get(t, 0) > 0:
                jumps[t] -= 1
                for _ in range(jump):
                    t += 1
                    visited.append(t)
        visited.append(-1)
        moves = repaint_moves(length, jump, resamples)
        assert moves == [b - a for a, b in pairwise(visited)]


@pytest.mark.parametrize("kind", [LinearNoiseScheduler, CosineNoiseScheduler])
def test_noise_added_in_two_parts_is_noise_added_at_once(kind):
    scheduler = kind()
    x = torch.zeros(200_000, dtype=torch.float64)
    noise = torch.randn(2, 200_000, dtype=torch.float64, generator=seeded(0))
    once = (1 - scheduler.alphas_cumprod_float64[700]).sqrt()
    for between in (0, 300, 699):
        twice = scheduler.renoise(scheduler.renoise(x, -1, between, noise[0]), between, 700, noise[1])
        assert abs(twice.std() - once) < 5 * once / math.sqrt(2 * 200_000)
        gain = scheduler.renoise(scheduler.renoise(torch.ones(1), -1, between, 0), between, 700, 0)
        assert_close(gain.item(), scheduler.alphas_cumprod_float64[700].sqrt().item(), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="timestep=5, to_timestep=5: they must satisfy -1 <= timestep < to_timestep"):
        scheduler.renoise(x, 5, 5, noise[0])


def test_mixtures_go_from_one_image_to_the_other(digits):
    pipeline, images, labels = digits
    a, b = images[0], images[3]
    settings = {"generator": seeded(0), "num_inference_steps": 100, "output_type": "pt", "class_labels": int(labels[0])}
    made = pipeline.interpolate(a, b, 100, 7, **settings).images
    assert made.shape == (7, 1, 8, 8)
    assert distance(made[0], a) < distance(made[0], b)
    assert distance(made[-1], b) < distance(made[-1], a)
    to_a = [distance(image, a) for image in made]
    assert to_a[0] < to_a[3] < to_a[6]
    # all timesteps from t on are visited, t included
    seen = []
    note = lambda pipe, i, t, tensors: seen.append(int(t))  # noqa: E731
    pipeline.interpolate(a, b, 7, 2, class_labels=3, callback_on_step_end=note)
    assert seen == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("name", ["ddpm", *SOLVERS])
def test_every_solver_goes_from_one_image_to_the_other(digits, name):
    pipeline, images, labels = digits
    a, b = images[0], images[3]
    settings = {"num_inference_steps": 50, "output_type": "pt", "class_labels": int(labels[0]), "scheduler": name}
    if name == "pndm":
        with pytest.raises(ValueError, match="PNDMScheduler can't start in the middle of its timesteps"):
            pipeline.interpolate(a, b, 100, 3, **settings)
        return
    made = pipeline.interpolate(a, b, 100, 3, generator=seeded(0), **settings).images
    assert distance(made[0], a) < distance(made[0], b)
    assert distance(made[-1], b) < distance(made[-1], a)
    settings |= {"method": "inversion", "steps": 3}
    made = pipeline.interpolate(a, b, **settings, generator=seeded(0)).images
    assert made.isfinite().all()
    if name in ("ddim", "heun", "euler", "dpm++", "unipc"):  # they follow the same ODE
        assert distance(made[0], a) < 0.1


@pytest.mark.parametrize(("channels", "size"), [(1, (6, 10)), (3, (8, 8)), (4, (10, 6)), (5, (8, 12))])
@pytest.mark.parametrize("guided", [False, True])
def test_every_call_takes_any_channels_sizes_and_classes(channels, size, guided):
    pipeline = tiny_pipeline(in_channels=channels, sample_size=size, **({"num_classes": 3} if guided else {}))
    classes = {"class_labels": 2, "guidance_scale": 2.5} if guided else {}
    settings = {"num_inference_steps": 5, "output_type": "pt", "generator": seeded(0), **classes}
    x = torch.rand(2, channels, *size, generator=seeded(1))
    a, b, mask = x[0], x[1], torch.eye(*size)
    noise = pipeline.invert(x, 5, **classes)
    calls = {
        "plain": pipeline(2, **settings), "image": pipeline(image=x, strength=0.5, **settings),
        "latents": pipeline(latents=noise, **settings), "inpaint": pipeline.inpaint(x, mask, **settings),
        "mix": pipeline.interpolate(a, b, 700, 2, **settings),
        "slerp": pipeline.interpolate(method="slerp", steps=2, **settings),
        "inversion": pipeline.interpolate(a, b, method="inversion", steps=2, **settings),
    }  # fmt: skip
    for name, output in calls.items():
        assert output.images.shape == (2, channels, *size), name
        assert output.images.isfinite().all(), name


def test_defaults_of_a_model_with_few_timesteps():
    pipeline = DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler(20))
    pipeline.set_progress_bar_config(disable=True)
    x = torch.rand(1, 1, 8, 8, generator=seeded(0))
    assert pipeline.inpaint(x, torch.eye(8)).images
    assert pipeline.invert(x).shape == x.shape


def test_a_film_of_inpainting_counts_denoising_steps(digits):
    pipeline, images, _ = digits
    film, mask = Film({4}), torch.ones(8, 8, dtype=torch.bool)
    settings = {"num_inference_steps": 8, "jump_length": 2, "num_resamples": 4, "class_labels": 3}
    pipeline.inpaint(images[0], mask, callback_on_step_end=film, **settings)
    assert film.samples.shape == (1, 1, 1, 8, 8)


def test_inversion_with_zero_terminal_snr():
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    x = torch.rand(1, 1, 8, 8, generator=seeded(0))
    for spacing, works in (("trailing", False), ("leading", True)):
        pipeline = DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler(timestep_spacing=spacing, **zero))
        pipeline.set_progress_bar_config(disable=True)
        if works:
            assert pipeline.invert(x, 10).isfinite().all()
        else:
            with pytest.raises(ValueError, match="invert can't reach timestep 999, where rescale_betas_zero_snr=True"):
                pipeline.invert(x, 10)


@pytest.mark.parametrize("method", ["slerp", "inversion"])
def test_arcs_begin_and_end_at_their_ends(digits, method):
    pipeline, images, _ = digits
    ends = {} if method == "slerp" else {"image_a": images[0], "image_b": images[3]}
    settings = {"method": method, "num_inference_steps": 50, "output_type": "pt", "class_labels": 5, "steps": 5}
    made = pipeline.interpolate(generator=seeded(0), **ends, **settings).images
    if method == "inversion":
        assert distance(made[0], images[0]) < 0.03
        assert distance(made[-1], images[3]) < 0.03
    else:
        noise = [torch.randn(1, 1, 8, 8, generator=g) for g in [seeded(0)] for _ in range(2)]
        by_hand = {"scheduler": "ddim", "num_inference_steps": 50, "output_type": "pt", "class_labels": 5}
        for end, z in ((made[:1], noise[0]), (made[-1:], noise[1])):
            assert_close(pipeline(latents=z, **by_hand).images, end, rtol=0, atol=1e-4)
    jumps = [distance(p, q) for p, q in pairwise(made)]
    assert max(jumps) < 0.9 * distance(made[0], made[-1])


def test_slerp_keeps_the_length():
    a, b = torch.randn(2, 1, 3, 16, 16, generator=seeded(0)).unbind()
    weights = torch.linspace(0, 1, 5).reshape(-1, 1, 1, 1)
    on_arc = slerp(a / a.norm(), b / b.norm(), weights)
    assert_close(on_arc.flatten(1).norm(dim=1), torch.ones(5))
    assert_close(on_arc[0], a[0] / a.norm())
    assert_close(on_arc[-1], b[0] / b.norm())
    assert_close(slerp(a, a, weights), a.expand(5, -1, -1, -1))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_image_comes_back_from_its_noise(digits, guidance_scale):
    """At least 30 dB for each held-out image, in 50 steps."""
    pipeline, images, labels = digits
    settings = {"num_inference_steps": 50, "class_labels": labels, "guidance_scale": guidance_scale}
    noise = pipeline.invert(images, **settings)
    assert 0.5 < noise.var() < 1.5
    back = pipeline(latents=noise, scheduler="ddim", clip_sample=False, output_type="pt", **settings).images
    psnr = -10 * (back - images).square().mean(dim=(1, 2, 3)).log10()
    assert psnr.min() >= 30


def test_sampling_can_be_interrupted(digits):
    pipeline, images, _ = digits
    seen = []

    def stop(pipe, i, timestep, tensors):
        seen.append(i)
        pipe.interrupt = i == 2

    mask = torch.ones(8, 8, dtype=torch.bool)
    calls = [
        lambda **kw: pipeline(class_labels=3, **kw),
        lambda **kw: pipeline.inpaint(images[0], mask, class_labels=3, **kw),
        lambda **kw: pipeline.interpolate(method="slerp", class_labels=3, **kw),
        lambda **kw: kw.pop("output_type") and pipeline.invert(images, class_labels=3, **kw),
    ]
    for call in calls:
        seen.clear()
        images_so_far = call(num_inference_steps=10, callback_on_step_end=stop, output_type="pt")
        images_so_far = getattr(images_so_far, "images", images_so_far)
        assert seen == [0, 1, 2]
        assert images_so_far.isfinite().all()


def test_the_same_noise_at_every_dtype_and_batch_size(digits):
    pipeline, _, _ = digits
    labels = [k % 10 for k in range(64)]
    settings = {"num_inference_steps": 50, "output_type": "pt"}
    together = pipeline(64, image_generators(7, range(64)), class_labels=labels, **settings).images
    if torch.cuda.is_available():
        on_gpu = pipeline.to("cuda")(64, image_generators(7, range(64)), class_labels=labels, **settings).images.cpu()
        assert_close(on_gpu, together, rtol=0, atol=1e-3)
        pipeline.to("cpu")
    for k in (0, 41):
        alone = pipeline(1, image_generators(7, [k]), class_labels=labels[k], **settings).images
        assert_close(alone, together[k : k + 1], rtol=0, atol=1e-4)
    expected = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in image_generators(7, range(3))])
    for dtype in (torch.float32, torch.bfloat16):
        copy, seen = DDPMCustomPipeline(tiny_unet().to(dtype), pipeline.scheduler), []
        copy.unet.register_forward_hook(lambda _, args, out, seen=seen: seen.append(args[0]))
        copy(3, image_generators(7, range(3)), 2)
        assert torch.equal(seen[0], expected.to(dtype))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: p(image=x, strength=0), r"strength=0 must be a number in \(0, 1\]"),
        (lambda p, x: p(strength=0.5), "strength=0.5 needs image"),
        (lambda p, x: p(image=x.numpy()), r"image has shape \(2, 1, 8, 8\); it must have shape \(B, H, W, 1\)"),
        (lambda p, x: p.interpolate(x[0], x[1], 5, scheduler="dpm++", num_inference_steps=3), "t=5 must be at least"),
        (lambda p, x: p(image=x * 2), "image has values .* they must be in 0 ... 1"),
        (lambda p, x: p(image=x.expand(-1, 3, -1, -1)), r"image has shape \(2, 3, 8, 8\); it must have shape \(B, 1"),
        (lambda p, x: p(image=x.byte()), "image is torch.uint8; it must be PIL images, or an array"),
        (lambda p, x: p(image="cat.png"), "image is str; it must be PIL images"),
        (lambda p, x: p(image=Image.new("RGB", (8, 8))), "image has mode 'RGB'; this model needs 'L'"),
        (lambda p, x: p(3, image=x), "batch_size=3 must be the number of images or latents, 2, or None"),
        (lambda p, x: p(image=x, latents=x), "image and latents can't both be given"),
        (lambda p, x: p(latents=x[:, 0]), r"latents is \(2, 8, 8\); it must be a tensor of floats of shape"),
        (lambda p, x: p.inpaint(x, torch.ones(8, 9)), r"mask has shape \(8, 9\); .* one of \(8, 8\), \(2, 8, 8\)"),
        (lambda p, x: p.inpaint(x, torch.full((8, 8), 0.5)), r"mask must contain only 0 \(known\) and 1"),
        (lambda p, x: p.inpaint(x, torch.ones(8, 8), jump_length=0), "jump_length=0 must be an integer of at least 1"),
        (lambda p, x: p.inpaint(x, torch.ones(8, 8), num_resamples=1.5), "num_resamples=1.5 must be an integer"),
        (lambda p, x: p.inpaint(x, torch.ones(8, 8), class_labels=3), "class_labels=3: this model is unconditional"),
        (lambda p, x: p.interpolate(x[0], x[1], 1000), "t=1000 must be an integer in 0 ... 999"),
        (lambda p, x: p.interpolate(x[0], x[1], -1), "t=-1 must be an integer in 0 ... 999"),
        (lambda p, x: p.interpolate(x[0], x[1]), "t=None must be an integer in 0 ... 999"),
        (lambda p, x: p.interpolate(x[0], x[1], 5, 1), "steps=1 must be an integer of at least 2"),
        (lambda p, x: p.interpolate(x[0], None, 5), "method='mix' needs both image_a and image_b"),
        (lambda p, x: p.interpolate(x[0], x[1], method="slerp"), "method='slerp' takes neither image_a nor image_b"),
        (lambda p, x: p.interpolate(t=3, method="slerp"), "t=3 must be None with method='slerp'"),
        (lambda p, x: p.interpolate(x, x, 5), "image_a and image_b have shapes .* must be single images of one size"),
        (lambda p, x: p.interpolate(x[0], x[1], 5, method="warp"), "method='warp' must be one of mix, slerp"),
        (lambda p, x: p.interpolate(x[0], x[1], 5, generator=[seeded(0)]), "generator must be a single generator"),
        (lambda p, x: p.invert(x, iterations=0), "iterations=0 must be an integer of at least 1"),
        (lambda p, x: p.invert(x, 0), "num_inference_steps=0 must be an integer in 1 ... 1000"),
    ],
)  # fmt: skip
def test_invalid_images_and_masks(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_pipeline(), torch.rand(2, 1, 8, 8))


# ---------------------------------------------------------------- a learned variance


def of_learned_variance(**settings) -> DDPMCustomPipeline:
    unet = tiny_unet(out_channels=2, **settings)
    pipeline = DDPMCustomPipeline(unet, LinearNoiseScheduler(variance_type="learned_range"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def half_of(unet, **settings):
    """The same network without the variance in its output."""
    half = tiny_unet(**settings)
    weights = unet.state_dict()
    half.load_state_dict(weights | {name: weights[name][:1] for name in ("conv_out.weight", "conv_out.bias")})
    return half


def test_other_solvers_ignore_the_learned_variance():
    learned = of_learned_variance()
    fixed = DDPMCustomPipeline(half_of(learned.unet), LinearNoiseScheduler())
    fixed.set_progress_bar_config(disable=True)
    for scheduler in SOLVERS:
        a, b = (
            pipeline(2, [seeded(0), seeded(1)], 5, "pt", scheduler=scheduler).images for pipeline in (learned, fixed)
        )
        assert_close(a, b, rtol=0, atol=1e-5)
    a, b = (pipeline(2, [seeded(0), seeded(1)], 5, "pt").images for pipeline in (learned, fixed))
    assert not torch.allclose(a, b, atol=1e-2)
    image = torch.rand(1, 1, 8, 8, generator=seeded(0))
    a, b = (pipeline.invert(image, num_inference_steps=5) for pipeline in (learned, fixed))
    assert_close(a, b, rtol=0, atol=1e-5)


def test_a_learned_variance_is_saved_and_loaded(tmp_path):
    pipeline = of_learned_variance()
    pipeline.save_pretrained(tmp_path)
    again = DDPMCustomPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    a, b = (each(2, [seeded(0), seeded(1)], 5, "pt").images for each in (pipeline, again))
    assert_close(a, b, rtol=0, atol=0)
    mask = torch.zeros(8, 8)
    mask[2:6] = 1
    assert again.inpaint(a[:1], mask, num_inference_steps=5, generator=seeded(0)).images


def test_guidance_changes_the_prediction_and_not_the_variance():
    pipeline, seen = of_learned_variance(num_classes=3), []
    pipeline.unet.class_embedding.weight.data *= 3
    step = LinearNoiseScheduler.step
    outputs = []
    pipeline.unet.register_forward_hook(lambda *args: outputs.append(args[-1].sample))

    def spy(self, model_output, *args, **settings):
        seen.append(model_output)
        return step(self, model_output, *args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearNoiseScheduler, "step", spy)
        pipeline(class_labels=[0, 2], guidance_scale=3.0, num_inference_steps=1, generator=seeded(0))
    of_class, of_none = outputs[0].chunk(2)
    assert_close(seen[0][:, :1], (3 * of_class - 2 * of_none)[:, :1])
    assert_close(seen[0][:, 1:], of_class[:, 1:], rtol=0, atol=0)


# ---------------------------------------------------------------- samples that are not finite


def of_pixels(value: float = 0.5) -> torch.Tensor:
    return torch.full((1, 1, 8, 8), value)


METHODS = {
    **{kind: lambda pipe, kind=kind: pipe(2, seeded(0), 3, output_type=kind) for kind in ("pil", "np", "pt", "latent")},
    "solver": lambda pipe: pipe(2, seeded(0), 3, scheduler="ddim"),
    "image": lambda pipe: pipe(2, seeded(0), 5, image=of_pixels()),
    "inpaint": lambda pipe: pipe.inpaint(of_pixels(), torch.eye(8), 3, num_resamples=1),
    "inpaint, latent": lambda pipe: pipe.inpaint(of_pixels(), torch.eye(8), 3, num_resamples=1, output_type="latent"),
    "mix": lambda pipe: pipe.interpolate(of_pixels(), of_pixels(0.1), 500, 2, num_inference_steps=4),
    "slerp": lambda pipe: pipe.interpolate(steps=2, method="slerp", num_inference_steps=4),
    "inversion": lambda pipe: pipe.interpolate(
        of_pixels(), of_pixels(0.1), steps=2, method="inversion", num_inference_steps=4
    ),
    "invert": lambda pipe: pipe.invert(of_pixels(), 3),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_names_a_weight_that_is_not_finite(method, value):
    """Also infinities, which clamping x_0 would turn into black or white pixels."""
    pipeline = tiny_pipeline()
    METHODS[method](pipeline)
    pipeline.unet.conv_out.bias.data[0] = value
    n = r"([12]) of \1 images hold NaN or infinities"
    told = (
        rf"^the samples are not finite: {n}; weights are not finite: 1 of \d+ tensors have NaN or infinities, such as "
        r"conv_out.bias \(float32\); load weights"
    )
    with pytest.raises(ValueError, match=told):
        METHODS[method](pipeline)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_sample_that_is_not_finite_is_enough(value):
    def spoil(pipeline, step, timestep, tensors):
        tensors["sample"][1, 0, 3, 3] = value
        return tensors

    told = "1 of 3 images hold .*; all weights are finite, so DDIMScheduler in 4 steps diverged: use another scheduler"
    with pytest.raises(ValueError, match=told):
        tiny_pipeline()(3, seeded(0), 4, scheduler="ddim", callback_on_step_end=spoil)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_activations_too_large_for_float16_raise(how):
    pipeline = tiny_pipeline()
    pipeline.unet.conv_out.weight.data.fill_(60000)
    if how == "weights":
        pipeline.unet.to(torch.float16)
    told = "all weights are finite, so an activation exceeds 65504, the largest float16 number: use bfloat16 or float32"
    with pytest.raises(ValueError, match=told), torch.autocast("cpu", torch.float16, enabled=how == "autocast"):
        pipeline(1, seeded(0), 2)
    pipeline.unet.to(torch.float32)
    pipeline(1, seeded(0), 2)


def test_the_check_of_samples_reads_values_at_the_end_only():
    class Reads(TorchDispatchMode):
        """Counts the values of tensors that Python reads."""

        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    counts = []
    for steps in (2, 20):
        with Reads() as reads:
            tiny_pipeline()(2, seeded(0), steps, output_type="pt")
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_latents_that_are_not_finite():
    latents = torch.zeros(1, 1, 8, 8)
    latents[0, 0, 2, 2] = math.nan
    with pytest.raises(ValueError, match="latents contains NaN or infinities; it must be finite"):
        tiny_pipeline()(latents=latents, num_inference_steps=2)


# ---------------------------------------------------------------- compiled and wrapped networks


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe, steps: pipe(1, seeded(0), steps),
        lambda pipe, steps: pipe.invert(of_pixels(), steps),
        lambda pipe, steps: pipe.inpaint(of_pixels(), torch.eye(8), steps, num_resamples=1),
    ],
    ids=["sample", "invert", "inpaint"],
)
def test_a_compiled_network_has_one_graph_for_all_timesteps(call):
    torch._dynamo.reset()
    pipeline, counter = tiny_pipeline(), CompileCounter()
    expected = call(pipeline, 6)
    pipeline.unet.compile(backend=counter)
    call(pipeline, 2)
    graphs = counter.frame_count
    found = call(pipeline, 6)
    assert counter.frame_count == graphs > 0
    if isinstance(found, torch.Tensor):
        assert_close(found, expected)


def test_a_network_in_data_parallel_is_unwrapped():
    unet = tiny_pipeline().unet
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for wrapped in (torch.nn.parallel.DistributedDataParallel(unet), torch.nn.DataParallel(unet)):
            pipeline = DDPMCustomPipeline(wrapped, LinearNoiseScheduler())
            assert pipeline.unet is unet
            assert len(pipeline(1, seeded(0), 2).images) == 1
    finally:
        torch.distributed.destroy_process_group()
