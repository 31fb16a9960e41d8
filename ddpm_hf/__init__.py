"""Denoising diffusion probabilistic models that plug into diffusers: `DDPMUNet`, `LinearNoiseScheduler`,
`CosineNoiseScheduler`, `DDPMCustomPipeline`."""

import diffusers
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401

from ddpm_hf.pipeline import DDPMCustomPipeline
from ddpm_hf.scheduler import CosineNoiseScheduler, LinearNoiseScheduler
from ddpm_hf.unet import DDPMUNet

__version__ = "0.1.0"
__all__ = ["CosineNoiseScheduler", "DDPMCustomPipeline", "DDPMUNet", "LinearNoiseScheduler"]


def _register_with_diffusers() -> None:
    """Let saved pipelines record and find our classes under the name `ddpm_hf`, whichever file they are in.

    diffusers loads a component of another package only where that package is a key of LOADABLE_CLASSES and has the
    names `ModelMixin` and `SchedulerMixin` (imported above for that alone); stock `DiffusionPipeline.from_pretrained`
    looks the pipeline's class up among diffusers' attributes. This is private API, watched by a test.
    """
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    LOADABLE_CLASSES.setdefault(
        "ddpm_hf",
        {
            "ModelMixin": ["save_pretrained", "from_pretrained"],
            "SchedulerMixin": ["save_pretrained", "from_pretrained"],
        },
    )
    for cls in (DDPMCustomPipeline, DDPMUNet, LinearNoiseScheduler, CosineNoiseScheduler):
        setattr(diffusers, cls.__name__, cls)


_register_with_diffusers()
