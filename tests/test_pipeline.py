import json
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_unet
from torch.testing import assert_close

from ddpm_hf import CosineNoiseScheduler, DDPMCustomPipeline, DDPMUNet, LinearNoiseScheduler


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
    with pytest.raises(ValueError, match="output_type='pil' shows 1 to 4 channels, not 5"):
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


SOLVERS = ["DDIM", "DDPM", "PNDM", "DEISMultistep", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete",
           "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "SASolver"]  # fmt: skip


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_any_solver_of_diffusers_samples_gaussian_data(name):
    """With the optimal network for N(0, 1) every solver must give about N(0, 1)."""

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
    pipeline.unet.class_embedding.weight.data *= 3  # so that a network that has learnt nothing tells them apart
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
    abar, means, size, steps = scheduler._alphas_cumprod, torch.tensor(CLASS_MEANS).double(), (3, 1, 8, 8), 20

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
        ({}, "class_labels: this model is class-conditional; give .* labels 0 ... 2 or names cat, dog, 7"),
        ({"class_labels": 3}, "class_labels=3: 3 is no class; there are labels 0 ... 2 or names cat, dog, 7"),
        ({"class_labels": [0, -1]}, "-1 is no class"),
        ({"class_labels": "mouse"}, "class_labels='mouse': 'mouse' is no class; there are labels 0 ... 2 or names"),
        ({"class_labels": 1.0}, "1.0 is no class"),
        ({"class_labels": True}, "True is no class"),
        ({"class_labels": range(4)}, "3 is no class"),
        ({"class_labels": []}, "class_labels: 0 for batch_size=None"),
        ({"class_labels": [0, 1], "batch_size": 3}, "class_labels: 2 for batch_size=3; give one for all or one an"),
        ({"class_labels": 0, "guidance_scale": -1}, "guidance_scale=-1 must be a number of at least 0"),
        ({"class_labels": 0, "guidance_scale": "2"}, "guidance_scale='2' must be a number of at least 0"),
        ({"class_labels": 0, "guidance_scale": float("nan")}, "guidance_scale=nan must be a number of at least 0"),
    ],
)
def test_classes_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        of_classes()(num_inference_steps=2, **call)


def test_an_unconditional_model_takes_no_classes():
    for call in ({"class_labels": [0]}, {"guidance_scale": 2.0}):
        with pytest.raises(ValueError, match=rf"{next(iter(call))}=.*: this model is unconditional; leave"):
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

    assert "ddpm_hf" in LOADABLE_CLASSES  # private API: if this fails, diffusers has changed how it finds plugins


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


def test_calls_that_cannot_be():
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
    with pytest.raises(ValueError, match="output_type='jpg'; choose from pil, np, pt, latent"):
        pipeline(1, output_type="jpg")
    with pytest.raises(ValueError, match="generator: a list of 1 for a batch of 2"):
        pipeline(2, [seeded(0)])
