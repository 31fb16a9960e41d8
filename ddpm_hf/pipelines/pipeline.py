"""Sampling: `DDPMCustomPipeline`, and the loop over timesteps that each of its methods runs."""

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from os import PathLike
from typing import Self

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, PNDMScheduler, UNet2DModel
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import logging

from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.pipelines.editing import EditingMixin
from ddpm_hf.pipelines.images import OUTPUT_TYPES, PIL_MODES, NotFiniteError, to_output, to_unit
from ddpm_hf.pipelines.loading import load_components
from ddpm_hf.schedulers.noise import CosineNoiseScheduler, LinearNoiseScheduler, draw_noise
from ddpm_hf.schedulers.solvers import make_solver, set_timesteps_checked


class DDPMCustomPipeline(EditingMixin, DiffusionPipeline):
    """Sampling (Ho et al. 2020, arXiv:2006.11239, algorithm 2), of classes if the network knows some.

    Calling it makes images; `inpaint` paints what is missing of some, `interpolate` makes those between two, and
    `invert` gives the noise that an image comes from.

    Args:
        unet: the network that predicts the noise (or x_0, or v, as the scheduler's `prediction_type` says): `DDPMUNet`,
            `UNet2DModel`, or another that is called like them.
        scheduler: `LinearNoiseScheduler`, `CosineNoiseScheduler`, or any of diffusers' that is built from their config.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel | DDPMUNet | ModelMixin,
        scheduler: LinearNoiseScheduler | CosineNoiseScheduler | KarrasDiffusionSchedulers,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.interrupt = False
        self.num_timesteps = 0

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **kwargs) -> Self:
        """A pipeline that was saved or pushed, from a folder, from the Hub, or without network from the Hub's cache.

        Code that a repository carries is not run, and no weights but safetensors are read.

        Args:
            pretrained_model_name_or_path: the folder, or user/model on the Hub.
            subfolder: where in it the pipeline lies; default: at its top.
            revision: branch, tag or commit on the Hub; default: main.
            variant: which weights, `"raw"` or `"fp16"` where they were saved; their type is that of `torch_dtype`.
            torch_dtype: of the network; default: float32.
            token: for private repositories; default: that of `hf auth login`.
            cache_dir, local_files_only, force_download: of what comes from the Hub.
            unet, scheduler: in place of those that were saved.
            device_map, max_memory, low_cpu_mem_usage, offload_folder, offload_state_dict, disable_mmap: as
                `ModelMixin.from_pretrained` has them.

        Raises:
            ValueError: an unknown argument; or in the folder: missing or damaged files, links out of the folder,
                unknown settings, weights that do not fit the configuration.
            OSError: the source is neither a folder nor can be downloaded.
        """
        pipeline = cls(**load_components(pretrained_model_name_or_path, **kwargs))
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline

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
    ) -> ImagePipelineOutput | tuple:
        """Sample images of the network's `sample_size`, or vary a given one.

        Args:
            batch_size: images to make; `None`: one a label, an image or a latent, or one.
            generator: one generator, from which noise for the whole batch is drawn, or a list of one an image: an
                image then does not depend on the batch it is in.
            num_inference_steps: denoising steps, 1 ... T; `None`: all T, or as many as the solver can take.
            output_type: `"pil"`: a list of `PIL.Image` (1 to 4 channels); `"np"`: (B, H, W, C) float32 in [0, 1];
                `"pt"`: (B, C, H, W) float in [0, 1]; `"latent"`: (B, C, H, W) as the network sees images, nominally
                in [-1, 1] and not clamped.
            callback_on_step_end: called after step i with (pipeline, i, timestep, {"sample": x, "pred_original_sample":
                the x_0 that the step assumed}); a `"sample"` in the dict that it returns takes the place of x. It may
                set `pipeline.interrupt = True`, and sampling ends with what there is. `pipeline.num_timesteps` is how
                many steps there are.
            class_labels: what to make, of a class-conditional network and of no other: labels or names of classes, one
                for all images or one an image.
            guidance_scale: of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, equation 6, where it is
                1 + w): the prediction without a class plus this many times what the class changes in it. 1: the class
                as it is; more: clearer and less diverse; 0: any class.
            scheduler: a solver for this call: a name ("ddim", "dpm++", "unipc" ..., see `ddpm_hf.schedulers.solvers.SOLVERS`), or
                a scheduler; `None`: the pipeline's own.
            image: begin from this, not from noise alone (SDEdit, Meng et al. 2022, arXiv:2108.01073): one `PIL.Image`
                or a list, or an array or tensor in [0, 1] as `output_type` gives them; of any height and width.
            strength: of `image`: the fraction of the steps to take, in (0, 1]; 1 leaves little of it. `None`: 0.8.
            latents: the noise to begin with, (B, C, H, W), in place of drawn noise: what `invert` gives.
            clip_sample: of a `scheduler` by name: whether it clamps the predicted x_0; `None`: as the pipeline's own.

        Returns:
            `ImagePipelineOutput` with `images`, or the tuple of it.

        Raises:
            ValueError: an invalid argument, or samples that are not finite (`NotFiniteError`), whatever the
                `output_type`: it names a weight that is not finite, or another likely cause.
        """
        if image is not None and latents is not None:
            raise ValueError("image, latents: give one of them to begin with")
        if image is None and strength is not None:
            raise ValueError(f"strength={strength!r} is of an image to begin with: give image too")
        strength = 0.8 if strength is None else strength
        if not isinstance(strength, Real) or not 0 < strength <= 1:
            raise ValueError(f"strength={strength!r} must lie in (0, 1]")
        start = self._latents(latents) if image is None else self._noiseless("image", image)
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
        )
        solver = loop.solver
        if start is not None:
            start = start.expand(loop.batch_size, -1, -1, -1)
        if image is not None:
            steps = solver.num_inference_steps
            loop.skip_steps(steps - max(1, round(steps * strength)))
            noise = loop.draw_noise(start.shape)
            sample = solver.add_noise(start, noise, loop.timesteps[:1].expand(loop.batch_size))
        elif latents is not None:
            sample = start * solver.init_noise_sigma
        else:
            sample = loop.draw_noise((loop.batch_size, *self.image_shape)) * solver.init_noise_sigma
        return self._output(loop.run(sample), output_type, return_dict, solver)

    def check_call(
        self, class_labels=None, guidance_scale=1.0, scheduler=None, num_inference_steps=None, clip_sample=None
    ) -> None:
        """Raises the ValueError that a call with these arguments would raise, without sampling."""
        self._prepare(
            num_inference_steps=num_inference_steps,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            clip_sample=clip_sample,
        )

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
    ) -> "DenoisingLoop":
        """Check the arguments of a call and set the solver's timesteps; `start` (N, ...): the images to begin with."""
        solver = make_solver(scheduler, self.scheduler, clip_sample)
        self._check_inputs(batch_size, num_inference_steps, output_type)
        given = 1 if start is None else len(start)
        if given > 1 and batch_size not in (None, given):
            raise ValueError(f"batch_size={batch_size} and {given} images to begin with: give one of them")
        labels = self._labels(class_labels, batch_size or (given if given > 1 else None), guidance_scale)
        if batch_size is None:
            batch_size = given if labels is None else len(labels)
        set_timesteps_checked(solver, num_inference_steps, self._execution_device)
        self.interrupt, self.num_timesteps = False, len(solver.timesteps)
        return DenoisingLoop(self, solver, batch_size, labels, guidance_scale, generator, callback)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is sampled"""
        size = self.unet.config.sample_size
        return self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size)

    @property
    def _state_dtype(self) -> torch.dtype:
        # The state stays in float32 whatever the network computes in: a thousand small steps would be rounded away.
        return torch.promote_types(self.unet.dtype, torch.float32)

    def _output(self, sample, output_type: str, return_dict: bool, solver):
        """What a call returns; samples that are not finite raise `NotFiniteError` with the likely cause."""
        self.maybe_free_model_hooks()
        try:
            images = to_output(sample, output_type)
        except NotFiniteError as error:
            raise NotFiniteError(f"{error}; {self._why_not_finite(solver)}") from None
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _why_not_finite(self, solver) -> str:
        if (bad := weight_not_finite(self.unet)) is not None:
            return bad
        offloaded = any(weight.is_meta for weight in self.unet.parameters())  # such weights have no values here
        finite = f"all weights{' that are not offloaded' if offloaded else ''} are finite"
        device = self._execution_device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.unet.dtype
        if dtype == torch.float16:
            return f"{finite}, so something in the network exceeds 65504, the most of float16: use bfloat16 or float32"
        steps = f"{type(solver).__name__} in {len(solver.timesteps)} steps"
        return f"{finite}, so {steps} diverged: use another scheduler or another num_inference_steps"

    def _labels(self, class_labels, batch_size: int | None, guidance_scale) -> torch.Tensor | None:
        """int64 (batch_size,) on the device, or None for an unconditional network."""
        classes = num_classes(self.unet)
        if classes is None:
            if class_labels is not None:
                raise ValueError(f"class_labels={class_labels!r}: this model is unconditional; leave them out")
            if guidance_scale != 1:
                raise ValueError(f"guidance_scale={guidance_scale!r}: this model is unconditional; leave it out")
            return None
        names = self.unet.config.class_names or []
        choices = f"labels 0 ... {classes - 1}"
        if names:
            choices += f" or names {', '.join(names[:10])}{' ...' if classes > 10 else ''}"
        if class_labels is None:
            raise ValueError(
                f"class_labels: this model is class-conditional; give one for all or one an image, {choices}"
            )
        if not isinstance(guidance_scale, Real) or not 0 <= guidance_scale < math.inf:
            raise ValueError(f"guidance_scale={guidance_scale!r} must be a number of at least 0; 1 is no guidance")
        if isinstance(class_labels, torch.Tensor | np.ndarray):
            class_labels = class_labels.tolist()
        several = isinstance(class_labels, Sequence) and not isinstance(class_labels, str)
        given = class_labels if several else [class_labels] * (batch_size or 1)
        if not given or batch_size not in (None, len(given)):
            raise ValueError(
                f"class_labels: {len(given)} for batch_size={batch_size}; give one for all or one an image"
            )
        labels = []
        for label in given:
            number = names.index(label) if isinstance(label, str) and label in names else label
            if isinstance(number, bool | str | float) or not 0 <= number < classes:
                raise ValueError(f"class_labels={class_labels!r}: {label!r} is no class; there are {choices}")
            labels.append(int(number))
        return torch.tensor(labels, dtype=torch.int64, device=self._execution_device)

    def _noiseless(self, name: str, images) -> torch.Tensor:
        """What `to_unit` takes, as the network sees it: (B, C, H, W) in [-1, 1], on the device."""
        images = to_unit(name, images, self.unet.config.in_channels)
        return images.to(self._execution_device, self._state_dtype) * 2 - 1

    def _latents(self, latents) -> torch.Tensor | None:
        if latents is None:
            return None
        channels = self.unet.config.in_channels
        if not isinstance(latents, torch.Tensor) or latents.ndim != 4 or latents.shape[1] != channels:
            what = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise ValueError(f"latents: is {what}; it must be a tensor of shape (B, {channels}, H, W)")
        if not latents.isfinite().all():
            raise ValueError("latents: holds NaN or infinities; it must be noise to begin with, such as invert gives")
        return latents.to(self._execution_device, self._state_dtype)

    def _check_inputs(self, batch_size, num_inference_steps, output_type) -> None:
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"batch_size={batch_size!r} must be an integer of at least 1")
        most = self.scheduler.config.num_train_timesteps  # beyond it diffusers' solvers give noise and no error
        steps = most if num_inference_steps is None else num_inference_steps
        if not isinstance(steps, Integral) or not 1 <= steps <= most:
            raise ValueError(f"num_inference_steps={num_inference_steps!r} must be an integer in 1 ... {most}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}; choose from {', '.join(OUTPUT_TYPES)}")
        channels = self.unet.config.in_channels
        if output_type == "pil" and channels not in PIL_MODES:
            raise ValueError(f"output_type='pil' shows 1 to 4 channels, not {channels}: use output_type='np' or 'pt'")


@dataclass
class DenoisingLoop:
    """The loop over timesteps of one call of a pipeline, and what all of its steps share.

    Args:
        pipeline: its network predicts, its progress bar shows the steps, and `interrupt` set on it ends them.
        solver: the scheduler, with its timesteps set.
        batch_size: B.
        labels: int64 (B,) on the network's device, or `None` of an unconditional network.
        guidance_scale, generator: as `DDPMCustomPipeline.__call__` has them.
        callback: its `callback_on_step_end`.
    """

    pipeline: DDPMCustomPipeline
    solver: SchedulerMixin
    batch_size: int
    labels: torch.Tensor | None
    guidance_scale: float
    generator: torch.Generator | list[torch.Generator] | None
    callback: Callable | None

    def __post_init__(self) -> None:
        self.timesteps = self.solver.timesteps
        # Some of diffusers' solvers draw noise; the others do not take a generator, and none takes a tuple of them.
        self._draws_noise = "generator" in inspect.signature(self.solver.step).parameters
        self.generator = list(self.generator) if isinstance(self.generator, tuple) else self.generator
        self._ours = None
        if self.callback is not None:
            with contextlib.suppress(ValueError):  # betas that ours can't have: x_0 is then unknown
                self._ours = make_solver("ddpm", self.solver)

    def draw_noise(self, shape) -> torch.Tensor:
        return draw_noise(shape, self.generator, self.pipeline._execution_device, self.pipeline._state_dtype)

    def skip_steps(self, number: int) -> None:
        """Begin `number` steps later, which the solver is told."""
        first = number * self.solver.order  # timesteps
        if hasattr(self.solver, "set_begin_index"):
            self.solver.set_begin_index(first)
        elif first and isinstance(self.solver, PNDMScheduler):
            raise ValueError("scheduler: PNDM can't begin in the middle of its timesteps; another solver can")
        self.timesteps = self.timesteps[first:]
        self.pipeline.num_timesteps = len(self.timesteps)

    def run(self, sample: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W) at the first timestep -> x after the last."""
        for i, timestep in enumerate(self.pipeline.progress_bar(self.timesteps)):
            if self.pipeline.interrupt:
                break
            sample = self.end_step(i, timestep, self.step(sample, timestep))
        return sample

    def step(self, sample: torch.Tensor, timestep) -> dict[str, torch.Tensor | None]:
        """x after one step, and the x_0 that the step assumed: the solver's own, or else computed for the callback."""
        model_input = self.solver.scale_model_input(sample, timestep)
        model_output = self.predict(model_input, timestep)
        prediction = model_output[:, : sample.shape[1]]
        learned = self.solver.config.get("variance_type") == "learned_range"
        of_step = model_output if learned else prediction  # other solvers have no use for the variance
        more = {"generator": self.generator} if self._draws_noise else {}
        output = self.solver.step(of_step, timestep, sample, **more)
        original = getattr(output, "pred_original_sample", None)
        if original is None and self._ours is not None:
            original = self._ours.predicted_original(prediction, round(float(timestep)), model_input)
        return {"sample": output.prev_sample, "pred_original_sample": original}

    def end_step(self, i: int, timestep, tensors: dict) -> torch.Tensor:
        """x after step `i`: that of `tensors`, or what the callback returns in its place."""
        changed = {} if self.callback is None else self.callback(self.pipeline, i, timestep, tensors) or {}
        return changed.get("sample", tensors["sample"])

    def predict(self, sample: torch.Tensor, timestep) -> torch.Tensor:
        """The network's output for `sample` (B, C, H, W) in the type of `sample`, guided.

        At one x_t the noise, x_0 and v are affine in one another, so it is all the same of which of them this mixture
        is made; the scheduler clamps the x_0 of the mixture. A learned variance is that of the class.
        """
        unet, labels, dtype = self.pipeline.unet, self.labels, sample.dtype
        sample = sample.to(unet.dtype)
        if labels is None:
            output = unet(sample, timestep).sample.to(dtype)
        elif self.guidance_scale == 1:
            output = unet(sample, timestep, class_labels=labels).sample.to(dtype)
        else:
            null = torch.full_like(labels, unet.config.num_classes)
            both = unet(torch.cat([sample, sample]), timestep, class_labels=torch.cat([labels, null])).sample
            of_class, of_none = both.to(dtype).chunk(2)
            C = sample.shape[1]
            guided = of_none[:, :C] + self.guidance_scale * (of_class[:, :C] - of_none[:, :C])
            output = torch.cat([guided, of_class[:, C:]], dim=1)
        # A solver that clamps x_0 would make a finite sample, black or white, of an infinity; NaN gets through to the
        # check at the end, and nobody waits for the device here.
        return torch.nan_to_num(output, nan=math.nan, posinf=math.nan, neginf=math.nan)


def num_classes(unet) -> int | None:
    """How many classes the network knows, None of an unconditional one."""
    for name in ("num_class_embeds", "class_embed_type"):  # UNet2DModel's, which have no label for no class
        if unet.config.get(name) is not None:
            raise ValueError(f"{name}={unet.config[name]!r}: only DDPMUNet is class-conditional here (num_classes)")
    return unet.config.get("num_classes")


def weight_not_finite(unet) -> str | None:
    """A message about the first weight in memory that holds NaN or infinities; None if there is none."""
    for name, weight in (*unet.named_parameters(), *unet.named_buffers()):
        if not weight.is_meta and not weight.float().isfinite().all():
            kind = str(weight.dtype).removeprefix("torch.")
            return (
                f"the network's weight {name} ({kind}) is not finite: load weights that are, in a torch_dtype that "
                "holds them"
            )
    return None


def load_pipeline(source: str, name: str, variant: str | None = None) -> DDPMCustomPipeline:
    """`DDPMCustomPipeline.from_pretrained` for commands: what goes wrong is a single ValueError about `name`.

    Weights that are not finite go wrong here, before a command spends hours on them or writes anything.
    """
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        pipeline = DDPMCustomPipeline.from_pretrained(source, **({"variant": variant} if variant else {}))
        if (bad := weight_not_finite(pipeline.unet)) is not None:
            raise ValueError(bad)
        return pipeline
    except Exception as error:  # the loader, the Hub and the network all raise their own
        raise ValueError(f"{name}={source!r} can't be loaded: {error}") from error
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
