import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_unet
from torch.testing import assert_close

from ddpm_hf import DDPMCustomPipeline, DDPMUNet, LinearNoiseScheduler


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


# ---------------------------------------------------------------- saving and loading

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
