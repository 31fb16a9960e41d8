"""Autoguidance: `pipe(guide=...)` guides a network by a weaker one."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_unet
from torch.testing import assert_close

from ddpm_hf import DDPMCustomPipeline, EDMScheduler, FlowMatchScheduler, LinearNoiseScheduler

KINDS = [LinearNoiseScheduler, FlowMatchScheduler, EDMScheduler]


def pipeline_of(unet, scheduler) -> DDPMCustomPipeline:
    pipeline = DDPMCustomPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weaker(**settings):
    return tiny_unet(block_out_channels=[8, 8], mid_block_out_channels=[8], up_block_out_channels=[8, 8], **settings)


class Guided(torch.nn.Module):
    """guide + s (unet - guide), written out as a network."""

    def __init__(self, unet, guide, scale):
        super().__init__()
        self.unet, self.guide, self.scale = unet, guide, scale
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    def forward(self, sample, timestep, **classes):
        strong, weak = (network(sample, timestep, **classes).sample for network in (self.unet, self.guide))
        return SimpleNamespace(sample=self.scale * strong + (1 - self.scale) * weak)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [None, 3])
def test_autoguidance_is_the_guided_network(kind, classes):
    """Equation 3 of arXiv:2406.02507: D_w = w D_1 + (1 - w) D_0, both for the same class."""
    unet, guide = tiny_unet(num_classes=classes), weaker(num_classes=classes)
    of_call = {"num_inference_steps": 4, "output_type": "latent"} | ({} if classes is None else {"class_labels": 2})
    by_hand = pipeline_of(Guided(unet, guide, 2.5), kind())
    wanted = by_hand(2, torch.Generator().manual_seed(0), **of_call).images
    pipeline = pipeline_of(unet, kind())
    for given in (guide, pipeline_of(guide, kind())):
        found = pipeline(2, torch.Generator().manual_seed(0), guide=given, guidance_scale=2.5, **of_call).images
        assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(pipeline(2, torch.Generator().manual_seed(0), **of_call).images, wanted, atol=1e-2)


def test_guides_that_do_not_fit():
    pipeline = pipeline_of(tiny_unet(), FlowMatchScheduler())
    wrong = [
        ("a folder", 2.0, "guide='a folder' must be a pipeline or a network"),
        (weaker(), 1.0, "guide has no effect with guidance_scale=1"),
        (weaker(in_channels=3), 2.0, "guide has in_channels=3 and this pipeline 1; they must be equal"),
        (weaker(num_classes=4), 2.0, "guide has num_classes=4 and this pipeline None"),
        (pipeline_of(weaker(), LinearNoiseScheduler()), 2.0, "guide has objective='ddpm' and this pipeline 'flow'"),
        (
            pipeline_of(weaker(), FlowMatchScheduler(100)),
            2.0,
            "guide has num_train_timesteps=100 and this pipeline 1000",
        ),
    ]
    for guide, scale, message in wrong:
        with pytest.raises(ValueError, match=message):
            pipeline(guide=guide, guidance_scale=scale)
    with pytest.raises(ValueError, match="this model is unconditional, so it must be 1 without a guide"):
        pipeline(guidance_scale=2.0)
