"""Denoising diffusion probabilistic models for diffusers: `DDPMUNet`, `LinearNoiseScheduler`, `CosineNoiseScheduler`,
`FlowMatchScheduler`, `EDMScheduler` and `DDPMCustomPipeline`."""

import importlib

from ddpm_hf.utils.import_hooks import call_when_imported, keep_former_names

__version__ = "0.1.0"

_CLASSES = {
    "DDPMUNet": "ddpm_hf.models.unet",
    "LinearNoiseScheduler": "ddpm_hf.schedulers.noise",
    "CosineNoiseScheduler": "ddpm_hf.schedulers.noise",
    "FlowMatchScheduler": "ddpm_hf.schedulers.flow",
    "EDMScheduler": "ddpm_hf.schedulers.edm",
    "DDPMCustomPipeline": "ddpm_hf.pipelines.pipeline",
}
_PUBLIC = _CLASSES | {
    "Film": "ddpm_hf.utils.pictures",
    "grid": "ddpm_hf.utils.pictures",
    "SOLVERS": "ddpm_hf.schedulers.solvers",
    "TrainConfig": "ddpm_hf.training.config",
    "train": "ddpm_hf.training",
    # diffusers' loader looks these base classes up in the package of a component, to tell a model from a scheduler.
    "ModelMixin": "diffusers.models.modeling_utils",
    "SchedulerMixin": "diffusers.schedulers.scheduling_utils",
}
__all__ = [*_CLASSES, "SOLVERS", "Film", "TrainConfig", "grid", "train"]


def __getattr__(name: str):
    """Import a public name on first use, so that `import ddpm_hf` imports neither torch nor diffusers (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_PUBLIC[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


# Registration with diffusers. Saved pipelines record our classes under the package name `ddpm_hf`. Stock
# `DiffusionPipeline.from_pretrained` looks the class of the pipeline up among the attributes of `diffusers`, and loads
# components only from the packages that are keys of LOADABLE_CLASSES. Both are private API, which the tests watch.
def _add_our_classes(diffusers) -> None:
    def our_class(name: str) -> type:
        if name not in _CLASSES:
            raise AttributeError(f"module 'diffusers' has no attribute {name!r}")
        return __getattr__(name)

    diffusers.__getattr__ = our_class  # Python calls it for the names that diffusers itself does not have


def _add_our_package(pipeline_loading_utils) -> None:
    methods = ["save_pretrained", "from_pretrained"]
    loadable = {"ModelMixin": methods, "SchedulerMixin": methods}
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault(__name__, loadable)


call_when_imported(
    {"diffusers": _add_our_classes, "diffusers.pipelines.pipeline_loading_utils": _add_our_package},
)
keep_former_names(
    {
        "ddpm_hf.cli": "ddpm_hf.commands.main",  # editable installations have a script that imports it
        "ddpm_hf.config": "ddpm_hf.training.config",
        "ddpm_hf.demo": "ddpm_hf.commands.demo_page",  # the app.py of existing Spaces imports it
        "ddpm_hf.films": "ddpm_hf.utils.pictures",
        "ddpm_hf.pipeline": "ddpm_hf.pipelines.pipeline",
        "ddpm_hf.scheduler": "ddpm_hf.schedulers.noise",
        "ddpm_hf.solvers": "ddpm_hf.schedulers.solvers",
        "ddpm_hf.unet": "ddpm_hf.models.unet",
    }
)
