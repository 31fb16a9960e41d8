"""Sampling: `DDPMCustomPipeline`, from noise to images."""

import math
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Self

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, UNet2DModel
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import logging

from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.pipelines.denoising import BATCH, CALL, MOST_VALUES, DenoisingLoop
from ddpm_hf.pipelines.editing import EditingMixin
from ddpm_hf.pipelines.images import NotFiniteError, mode_for, to_output, to_unit
from ddpm_hf.pipelines.loading import SAMPLING, load_components, weights_not_finite
from ddpm_hf.schedulers.continuous import ContinuousScheduler
from ddpm_hf.schedulers.edm import EDMScheduler
from ddpm_hf.schedulers.flow import FlowMatchScheduler
from ddpm_hf.schedulers.noise import CosineNoiseScheduler, LinearNoiseScheduler, NoiseScheduler
from ddpm_hf.schedulers.solvers import make_solver, scheduler_class, set_timesteps_checked, start_scale
from ddpm_hf.schedulers.timesteps import PREDICTION
from ddpm_hf.utils.arguments import check, check_all, checked, integer, limit, matching, one_of, optional, show

COMPONENTS = {
    "unet": matching(lambda v: isinstance(v, torch.nn.Module), "must be a network"),
    "scheduler": matching(lambda v: isinstance(v, SchedulerMixin), "must be a scheduler"),
    **SAMPLING,
}
OURS = (NoiseScheduler, ContinuousScheduler)


WRAPPERS = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)  # of a network in training


class DDPMCustomPipeline(EditingMixin, DiffusionPipeline):
    """Sample images (Ho et al. 2020, arXiv:2006.11239, algorithm 2), optionally of given classes.

    A call generates images. `inpaint` fills masked regions, `interpolate` generates the images between two images, and
    `invert` computes the noise from which DDIM generates an image.

    Args:
        unet: the network that predicts what the scheduler expects of it (the noise, x_0, v ...): `DDPMUNet`,
            `UNet2DModel`, or a network with the same call. Of a `DistributedDataParallel` or `DataParallel` it is the
            network inside.
        scheduler: `LinearNoiseScheduler`, `CosineNoiseScheduler`, `FlowMatchScheduler`, `EDMScheduler`, another
            `ContinuousScheduler`, or a scheduler of diffusers built from their config.
        sampling_scheduler: the solver, by name, of calls with fewer than T steps that name none, for instance
            `"unipc"`, if it was found to be the best for this model; `None`: `scheduler`. It is saved in
            model_index.json, and does not apply once `scheduler` is one of diffusers'.
        sampling_steps: the number of steps of calls that give none; `None`: T.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel | DDPMUNet | ModelMixin,
        scheduler: LinearNoiseScheduler
        | CosineNoiseScheduler
        | FlowMatchScheduler
        | EDMScheduler
        | ContinuousScheduler
        | KarrasDiffusionSchedulers,
        sampling_scheduler: str | None = None,
        sampling_steps: int | None = None,
    ) -> None:
        super().__init__()
        while isinstance(unet, WRAPPERS):
            unet = unet.module
        settings = {"sampling_scheduler": sampling_scheduler, "sampling_steps": sampling_steps}
        settings = check_all({"unet": unet, "scheduler": scheduler, **settings}, COMPONENTS)
        self.register_modules(unet=unet, scheduler=scheduler)
        if isinstance(scheduler, OURS):
            solvers = scheduler_class(scheduler.config).solvers
            check("sampling_scheduler", sampling_scheduler, optional(one_of(*solvers)))
        self.register_to_config(**{name: settings[name] for name in SAMPLING if settings[name] is not None})
        self.interrupt = False
        self.num_timesteps = 0

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **kwargs) -> Self:
        """Load a pipeline from a folder, from the Hub, or offline from the Hub's cache.

        Code in the repository is not run, and weights are read from safetensors only.

        Args:
            pretrained_model_name_or_path: a folder, or user/model on the Hub.
            subfolder: folder of the pipeline in it; `None`: its root.
            revision: branch, tag or commit on the Hub; `None`: main.
            variant: variant of the weights, such as `"raw"` (training weights) or `"fp16"`.
            torch_dtype: type of the network; `None`: float32, whatever the variant.
            token: access token for private repositories; `None`: that of `hf auth login`.
            cache_dir, local_files_only, force_download: see `huggingface_hub.snapshot_download`.
            unet, scheduler: replace the saved ones.
            device_map, max_memory, low_cpu_mem_usage, offload_folder, offload_state_dict, disable_mmap: see
                `ModelMixin.from_pretrained`.

        Raises:
            ValueError: an unknown argument, a missing or damaged file, a link out of the folder, an unknown setting,
                weights that do not match the configuration, or weights that are not finite in `torch_dtype`.
            OSError: the source is not a folder and cannot be downloaded.
        """
        pipeline = cls(**load_components(pretrained_model_name_or_path, **kwargs))
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline

    @checked(CALL)
    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DDPMCustomPipeline", int, torch.Tensor, dict], dict | None] | None = None,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        scheduler: str | SchedulerMixin | None = None,
        image=None,
        strength: float | None = None,
        latents: torch.Tensor | None = None,
        clip_sample: bool | None = None,
        guide=None,
    ) -> ImagePipelineOutput | tuple:
        """Sample images of the network's `sample_size`, or variations of `image`.

        Args:
            batch_size: number of images; `None`: one per label, image or latent.
            generator: one generator, which draws noise for the whole batch, or a list with one generator per image,
                which makes each image independent of its batch.
            num_inference_steps: denoising steps, 1 ... T; `None`: the pipeline's `sampling_steps`, else T, or the most
                that the solver supports.
            output_type: `"pil"`: a list of `PIL.Image` (1 to 4 channels); `"np"`: (B, H, W, C) float32 in [0, 1];
                `"pt"`: (B, C, H, W) float in [0, 1]; `"latent"`: (B, C, H, W), unclamped, nominally in [-1, 1].
            callback_on_step_end: called after step i with (pipeline, i, timestep, {"sample": x, "pred_original_sample":
                the predicted x_0}). A `"sample"` in the dict that it returns replaces x. If it sets
                `pipeline.interrupt = True`, sampling ends and x is returned. `pipeline.num_timesteps` is the number of
                steps.
            class_labels: classes, one for all images or one per image: an integer is the index of a class, a string its
                name, also if that is a number. An integer that is the name of another class is an error, because it is
                easily mistaken; in a tensor or an array, numbers are always indices. Required if the network is
                class-conditional, invalid otherwise.
            guidance_scale: scale s of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, equation 6 with
                s = 1 + w): unconditional + s (conditional - unconditional). 1: no guidance; 0: any class.
            scheduler: a solver for this call, by name ("ddim", "dpm++", "unipc" ..., see
                `solvers` of the class of the pipeline's scheduler) or as an object; `None`: the pipeline's
                `sampling_scheduler` for fewer than T steps, if it has one, else its scheduler.
            image: start from this image instead of pure noise (SDEdit, Meng et al. 2022, arXiv:2108.01073): a
                `PIL.Image`, a list of them, or an array or tensor in [0, 1] shaped like the output; of any size.
            strength: fraction of the steps that `image` goes through, in (0, 1]; `None`: 0.8. 1 keeps little of it.
            latents: start from this noise, (B, C, H, W), for example the result of `invert`.
            clip_sample: whether a `scheduler` given by name clamps the predicted x_0; `None`: like the pipeline's.
            guide: autoguidance (Karras et al. 2024, arXiv:2406.02507): a weaker pipeline or network for the same images
                and with the same objective, such as an early checkpoint or a smaller one, on the same device. Its
                prediction takes the place of the unconditional one in `guidance_scale`, also for models without
                classes.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of it.

        Raises:
            ValueError: an argument is invalid.
            NotFiniteError: samples contain NaN or infinities; the message names the likely cause.
        """
        if image is not None and latents is not None:
            raise ValueError("image and latents can't both be given")
        if image is None and strength is not None:
            raise ValueError(f"strength={strength} needs image")
        strength = 0.8 if strength is None else strength
        start = self._check_latents(latents) if image is None else self._to_model_range("image", image)
        scheduler, num_inference_steps = self.sampler(scheduler, num_inference_steps)
        loop = self._prepare(
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            output_type=output_type,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            generator=generator,
            callback=callback_on_step_end,
            start=start,
            clip_sample=clip_sample,
            guide=guide,
        )
        if image is not None:
            sample = loop.start_from_image(start.expand(loop.batch_size, -1, -1, -1), strength)
        elif latents is not None:
            sample = start.expand(loop.batch_size, -1, -1, -1) * start_scale(loop.solver)
        else:
            sample = loop.start_noise((loop.batch_size, *self.image_shape))
        return self._output(loop.run(sample), output_type, return_dict, loop.solver)

    @checked(CALL)
    def check_call(
        self, class_labels=None, guidance_scale=1.0, scheduler=None, num_inference_steps=None, clip_sample=None
    ) -> None:
        """Raise the ValueError that a call with these arguments would raise, without sampling."""
        scheduler, num_inference_steps = self.sampler(scheduler, num_inference_steps)
        self._prepare(
            num_inference_steps=num_inference_steps,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            clip_sample=clip_sample,
        )

    def sampler(self, scheduler: str | SchedulerMixin | None = None, num_inference_steps: int | None = None) -> tuple:
        """The `scheduler` and the `num_inference_steps` of a call with these arguments; `None`: those of training."""
        steps = self.config.get("sampling_steps") if num_inference_steps is None else num_inference_steps
        few = isinstance(steps, int) and steps < self.scheduler.config.num_train_timesteps
        if scheduler is None and few and isinstance(self.scheduler, OURS):
            scheduler = self.config.get("sampling_scheduler")
        return scheduler, steps

    def _prepare(
        self,
        *,
        batch_size=None,
        num_inference_steps=None,
        output_type="latent",
        class_labels=None,
        guidance_scale=1.0,
        scheduler=None,
        generator=None,
        callback=None,
        start=None,
        clip_sample=None,
        guide=None,
    ) -> DenoisingLoop:
        """Check the arguments of a call and set the solver's timesteps; `start` (N, ...): images or latents."""
        solver = make_solver(scheduler, self.scheduler, clip_sample)
        self._check_inputs(num_inference_steps, output_type)
        given = 1 if start is None else len(start)
        if given > 1 and batch_size not in (None, given):
            raise ValueError(f"batch_size={batch_size} must be the number of images or latents, {given}, or None")
        guide = self._guide_network(guide, guidance_scale)
        labels = self._labels(
            class_labels, batch_size or (given if given > 1 else None), 1 if guide is not None else guidance_scale
        )
        if batch_size is None:
            batch_size = given if labels is None else len(labels)
        check("batch_size", batch_size, BATCH)
        shape = tuple(self.image_shape if start is None else start.shape[1:])
        what = f"batch_size={batch_size}: images of shape {shape} are {{}} values together"
        limit(
            what,
            batch_size * math.prod(shape),
            MOST_VALUES,
            "they take 8 GB in float32; generate them in several calls",
        )
        set_timesteps_checked(solver, num_inference_steps, self._execution_device)
        self.interrupt, self.num_timesteps = False, len(solver.timesteps)
        return DenoisingLoop(self, solver, batch_size, labels, guidance_scale, generator, callback, guide)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the samples."""
        size = self.unet.config.sample_size
        return self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size)

    @property
    def _state_dtype(self) -> torch.dtype:
        # x_t stays in float32 if the network is in half precision, which would round small steps away.
        return torch.promote_types(self.unet.dtype, torch.float32)

    def _output(self, sample, output_type: str, return_dict: bool, solver):
        """Convert samples to what a call returns; raise NotFiniteError with the likely cause if they are not finite."""
        self.maybe_free_model_hooks()
        try:
            images = to_output(sample, output_type)
        except NotFiniteError as error:
            raise NotFiniteError(f"{error}; {self._why_not_finite(solver)}") from None
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _why_not_finite(self, solver) -> str:
        if (bad := weights_not_finite(self.unet)) is not None:
            return bad
        offloaded = any(weight.is_meta for weight in self.unet.parameters())
        finite = f"all weights{' that are not offloaded' if offloaded else ''} are finite"
        device = self._execution_device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.unet.dtype
        if dtype == torch.float16:
            return f"{finite}, so an activation exceeds 65504, the largest float16 number: use bfloat16 or float32"
        steps = f"{type(solver).__name__} in {len(solver.timesteps)} steps"
        return f"{finite}, so {steps} diverged: use another scheduler or another num_inference_steps"

    def _guide_network(self, guide, guidance_scale) -> torch.nn.Module | None:
        """The network of the argument `guide`. Raises ValueError if it does not predict what this pipeline's does."""
        if guide is None:
            return None
        network = guide.unet if isinstance(guide, DDPMCustomPipeline) else guide
        check("guide", network, matching(lambda v: isinstance(v, torch.nn.Module), "must be a pipeline or a network"))
        if guidance_scale == 1:
            raise ValueError("guide has no effect with guidance_scale=1; give a larger one, such as 2")
        ours, theirs = dict(self.unet.config), dict(network.config)
        pairs = [(name, ours.get(name), theirs.get(name)) for name in ("in_channels", "out_channels", "num_classes")]
        if network is not guide:
            ours, theirs = self.scheduler.config, guide.scheduler.config
            pairs += [("objective", scheduler_class(ours).objective, scheduler_class(theirs).objective)]
            pairs += [(name, ours.get(name), theirs.get(name)) for name in PREDICTION]
        for name, wanted, found in pairs:
            if wanted != found:
                raise ValueError(f"guide has {name}={show(found)} and this pipeline {show(wanted)}; they must be equal")
        return network

    def _labels(self, class_labels, batch_size: int | None, guidance_scale) -> torch.Tensor | None:
        """The class labels, int64 (batch_size,), on the device; `None` for an unconditional network."""
        classes = num_classes(self.unet)
        if classes is None:
            if class_labels is not None:
                raise ValueError(f"class_labels={show(class_labels)}: this model is unconditional, so it must be None")
            if guidance_scale != 1:
                raise ValueError(
                    f"guidance_scale={guidance_scale!r}: this model is unconditional, so it must be 1 without a guide"
                )
            return None
        names = self.unet.config.class_names or []
        choices = f"labels 0 ... {classes - 1}"
        if names:
            choices += f" or names {', '.join(names[:10])}{' ...' if classes > 10 else ''}"
        if class_labels is None:
            raise ValueError(f"class_labels=None: this model is class-conditional; choose from {choices}")
        are_indices = isinstance(class_labels, torch.Tensor | np.ndarray)
        if are_indices:
            class_labels = class_labels.tolist()
        several = isinstance(class_labels, Sequence) and not isinstance(class_labels, str)
        given = class_labels if several else [class_labels] * (batch_size or 1)
        if not given or batch_size not in (None, len(given)):
            rule = f"for batch_size={batch_size}; give one for all images or one per image"
            raise ValueError(f"class_labels has {len(given)} labels {rule}")
        labels = []
        for label in given:
            number = names.index(label) if isinstance(label, str) and label in names else label
            try:
                labels.append(integer(0, classes - 1)(number))
            except ValueError:
                what = f"class_labels={show(class_labels)}: {show(label, 40)}"
                raise ValueError(f"{what} is not a class; choose from {choices}") from None
            name, is_clear = str(labels[-1]), are_indices or isinstance(label, str)
            if not is_clear and name in names and names.index(name) != labels[-1]:
                raise ValueError(
                    f"class_labels={show(class_labels)}: {name} is the index of one class and the name of another "
                    f"({', '.join(names[:10])}); give a name as a text, {name!r}, or indices as a tensor"
                )
        return torch.tensor(labels, dtype=torch.int64, device=self._execution_device)

    def _to_model_range(self, name: str, images) -> torch.Tensor:
        """The argument `name`, in any form that `to_unit` takes -> (B, C, H, W) in [-1, 1], on the device."""
        images = to_unit(name, images, self.unet.config)
        return images.to(self._execution_device, self._state_dtype) * 2 - 1

    def _check_latents(self, latents) -> torch.Tensor | None:
        if latents is None:
            return None
        channels = self.unet.config.in_channels
        floats = (
            isinstance(latents, torch.Tensor)
            and latents.is_floating_point()
            and not latents.is_meta
            and latents.numel()
        )
        if not floats or latents.ndim != 4 or latents.shape[1] != channels:
            what = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise ValueError(f"latents is {what}; it must be a tensor of floats of shape (B, {channels}, H, W)")
        if not latents.isfinite().all():
            raise ValueError("latents contains NaN or infinities; it must be finite")
        return latents.to(self._execution_device, self._state_dtype)

    def _check_inputs(self, num_inference_steps, output_type) -> None:
        most = self.scheduler.config.num_train_timesteps  # with more, some of diffusers' solvers return noise
        check("num_inference_steps", most if num_inference_steps is None else num_inference_steps, integer(1, most))
        if output_type == "pil" and mode_for(self.unet.config) is None:
            bands = f"{self.unet.config.in_channels} bands"
            raise ValueError(
                f"output_type='pil' needs gray or RGB, perhaps with alpha, not {bands}; choose np, pt or latent"
            )


def num_classes(unet) -> int | None:
    """Number of classes of the network; `None` if it is unconditional."""
    for name in ("num_class_embeds", "class_embed_type"):  # class embeddings of UNet2DModel, without a null label
        if unet.config.get(name) is not None:
            raise ValueError(f"{name}={unet.config[name]!r} is not supported: only DDPMUNet can be class-conditional")
    return unet.config.get("num_classes")


def load_pipeline(source: str, name: str, variant: str | None = None) -> DDPMCustomPipeline:
    """`DDPMCustomPipeline.from_pretrained` for commands: any failure is a ValueError about the argument `name`.

    diffusers' own log of a failure is suppressed.
    """
    logger = logging.get_logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        return DDPMCustomPipeline.from_pretrained(source, **({"variant": variant} if variant else {}))
    except Exception as error:  # diffusers, huggingface_hub and the network raise many types
        raise ValueError(f"{name}={source!r} can't be loaded: {error}") from error
    finally:
        logger.setLevel(level)
