"""From noise to images, from images to noise, and what lies between: `DDPMCustomPipeline`."""

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Self

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, PNDMScheduler, UNet2DModel
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import logging

from ddpm_hf.images import OUTPUT_TYPES, PIL_MODES, NotFiniteError, from_unit, to_mask, to_output, to_unit
from ddpm_hf.loading import load_components
from ddpm_hf.scheduler import CosineNoiseScheduler, LinearNoiseScheduler, draw_noise
from ddpm_hf.solvers import CLAMPING, make_solver, set_walk
from ddpm_hf.unet import DDPMUNet

INTERPOLATIONS = ("mix", "slerp", "inversion")


class DDPMCustomPipeline(DiffusionPipeline):
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
            ValueError: an argument, or what was saved, can't be: a file that is missing, damaged or a link to
                elsewhere, a setting that nobody knows, weights that are not those of the configuration.
            OSError: neither here nor on the Hub.
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
            num_inference_steps: steps of the walk, 1 ... T; `None`: all T, or as many as the solver can take.
            output_type: `"pil"`: a list of `PIL.Image` (1 to 4 channels); `"np"`: (B, H, W, C) float32 in [0, 1];
                `"pt"`: (B, C, H, W) float in [0, 1]; `"latent"`: (B, C, H, W) as the network sees images, nominally
                in [-1, 1] and not clamped.
            callback_on_step_end: called after step i with (pipeline, i, timestep, {"sample": x, "pred_original_sample":
                the x_0 that the step assumed}); a `"sample"` in the dict that it returns takes the place of x. It may
                set `pipeline.interrupt = True`, and sampling ends with what there is.
            class_labels: what to make, of a class-conditional network and of no other: labels or names of classes, one
                for all images or one an image.
            guidance_scale: of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, equation 6, where it is
                1 + w): the prediction without a class plus this many times what the class changes in it. 1: the class
                as it is; more: clearer and less diverse; 0: any class.
            scheduler: a solver for this call: a name ("ddim", "dpm++", "unipc" ..., see `ddpm_hf.solvers.SOLVERS`), or
                a scheduler; `None`: the pipeline's own.
            image: begin from this, not from noise alone (SDEdit, Meng et al. 2022, arXiv:2108.01073): one `PIL.Image`
                or a list, or an array or tensor in [0, 1] as `output_type` gives them; of any height and width.
            strength: of `image`: the part of the walk to go, in (0, 1]; 1 leaves next to nothing of it. `None`: 0.8.
            latents: the noise to begin with, (B, C, H, W), in place of drawn noise: what `invert` gives.
            clip_sample: of a `scheduler` by name: whether it clamps the predicted x_0; `None`: as the pipeline's own.

        Returns:
            `ImagePipelineOutput` with `images`, or the tuple of it.

        Raises:
            ValueError: an argument that can't be, or samples that are not finite (`NotFiniteError`), of any
                `output_type`: it names a weight that is not finite, or what else the likely cause is.
        """
        if image is not None and latents is not None:
            raise ValueError("image, latents: give one of them to begin with")
        if image is None and strength is not None:
            raise ValueError(f"strength={strength!r} is of an image to begin with: give image too")
        strength = 0.8 if strength is None else strength
        if not isinstance(strength, Real) or not 0 < strength <= 1:
            raise ValueError(f"strength={strength!r} must lie in (0, 1]")
        start = self._latents(latents) if image is None else self._noiseless("image", image)
        solver, labels, batch_size = self._prepare(
            batch_size, num_inference_steps, output_type, class_labels, guidance_scale, scheduler, start, clip_sample
        )
        device, dtype = self._execution_device, self._state_dtype
        timesteps = solver.timesteps
        if image is not None:
            steps = solver.num_inference_steps
            timesteps = self._from(solver, (steps - max(1, round(steps * strength))) * solver.order)
            start = start.expand(batch_size, -1, -1, -1)
            noise = draw_noise(start.shape, generator, device, dtype)
            sample = solver.add_noise(start, noise, timesteps[:1].expand(batch_size))
        elif latents is not None:
            sample = start.expand(batch_size, -1, -1, -1) * solver.init_noise_sigma
        else:
            sample = draw_noise((batch_size, *self.image_shape), generator, device, dtype) * solver.init_noise_sigma
        sample = self._denoise(solver, timesteps, sample, generator, labels, guidance_scale, callback_on_step_end)
        return self._output(sample, output_type, return_dict, solver)

    @torch.no_grad()
    def inpaint(
        self,
        image,
        mask,
        num_inference_steps: int | None = None,
        jump_length: int = 10,
        num_resamples: int = 10,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        class_labels=None,
        guidance_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple:
        """Paint what is missing of images (RePaint, Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1).

        After each step the known part is replaced by the image with as much noise; every `jump_length` steps the walk
        goes back by as many, `num_resamples - 1` times, so that the new part can come to fit the known one. That takes
        up to `num_inference_steps * num_resamples` predictions; 1 resample is the plain walk.

        Args:
            image: as `__call__` takes it. What the mask covers is not looked at.
            mask: where to paint: bool or 0 and 1, (H, W), (B, H, W) or (B, 1, H, W), or a `PIL.Image` (white: paint).
            num_inference_steps: `None`: 250, or all T if they are fewer.
            generator and all others: as `__call__`'s. The solver is always our own scheduler.

        Returns:
            As `__call__`. The known pixels are exactly those of `image`.
        """
        for name, value in (("jump_length", jump_length), ("num_resamples", num_resamples)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        given = to_unit("image", image, self.unet.config.in_channels).to(self._execution_device)
        image = given.to(self._state_dtype) * 2 - 1
        mask = to_mask(mask, image.shape).to(self._execution_device)
        num_inference_steps = self._at_most(250) if num_inference_steps is None else num_inference_steps
        solver, labels, batch_size = self._prepare(
            None, num_inference_steps, output_type, class_labels, guidance_scale, "ddpm", image
        )
        image = image.expand(batch_size, -1, -1, -1)

        def noise():
            return draw_noise(image.shape, generator, image.device, image.dtype)

        visited = solver.timesteps.flip(0).tolist()  # upwards; x is at visited[position], -1 being the image
        sample, position = noise(), len(visited) - 1
        moves = _repaint_moves(len(visited), jump_length, num_resamples)
        i, generator = -1, list(generator) if isinstance(generator, tuple) else generator
        for move in self.progress_bar(moves):
            timestep, position = visited[position], position + move
            if move > 0:
                sample = solver.renoise(sample, timestep, visited[position], noise())
                continue
            tensors, i = self._step(solver, timestep, sample, generator, labels, guidance_scale), i + 1
            known = solver.add_noise(image, noise(), visited[position]) if position >= 0 else image
            tensors["sample"] = torch.where(mask, tensors["sample"], known)
            sample = self._after_step(callback_on_step_end, i, torch.tensor(timestep), tensors)
            if self.interrupt:
                break
        sample = torch.where(mask, sample, image)

        def convert(sample, output_type):
            if output_type == "latent":
                return to_output(sample, output_type)
            # the same bits as given, which [-1, 1] and back would not give
            return from_unit(torch.where(mask, to_output(sample, "pt"), given), output_type)

        return self._output(sample, output_type, return_dict, solver, convert)

    @torch.no_grad()
    def interpolate(
        self,
        image_a=None,
        image_b=None,
        t: int | None = None,
        steps: int = 9,
        method: str = "mix",
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        class_labels=None,
        guidance_scale: float = 1.0,
        scheduler: str | SchedulerMixin | None = None,
    ) -> ImagePipelineOutput | tuple:
        """`steps` images from one to another.

        Args:
            image_a, image_b: the ends, as `__call__` takes an image. For `"slerp"` none: its ends are drawn.
            t: of `"mix"`: the timestep, 0 ... T-1, up to which noise is added; the more, the more is made up. In a walk
                of fewer than T steps, the last one visited up to it (a ValueError if there is none).
            method: `"mix"`: noise is added to both, the same to each; mixtures of the two are denoised, with the same
                noise again (Ho et al. 2020, section 4.3, appendix D). `"slerp"`: images of noise on the arc between two
                (Song et al. 2021, arXiv:2010.02502, section 5.3). `"inversion"`: the same, between the noises that the
                two images come from (see `invert`).
            generator: one, for all that is drawn.
            class_labels: one for all images, or one each of the `steps`.
            scheduler: as `__call__`'s; `None`: the pipeline's own for `"mix"`, and DDIM for the others.
            all others: as `__call__`'s.

        Returns:
            As `__call__`, `steps` images.
        """
        if method not in INTERPOLATIONS:
            raise ValueError(f"method={method!r}; choose from {', '.join(INTERPOLATIONS)}")
        if not isinstance(steps, Integral) or steps < 2:
            raise ValueError(f"steps={steps!r} must be an integer of at least 2")
        if isinstance(generator, list | tuple):
            raise ValueError("generator: give one, from which all that is drawn comes, not a list")
        most = self.scheduler.config.num_train_timesteps - 1
        if method == "mix" and (not isinstance(t, Integral) or not 0 <= t <= most):
            raise ValueError(f"t={t!r} must be an integer in 0 ... {most}")
        if method != "mix" and t is not None:
            raise ValueError(f"t={t!r}: only method='mix' stops at a timestep; leave it out")
        ends = [self._noiseless(name, e) for name, e in (("image_a", image_a), ("image_b", image_b)) if e is not None]
        if len(ends) != (0 if method == "slerp" else 2):
            raise ValueError(f"image_a, image_b: method={method!r} takes {'none' if method == 'slerp' else 'both'}")
        if ends and (ends[0].shape != ends[1].shape or len(ends[0]) != 1):
            shapes = " and ".join(str(tuple(end.shape)) for end in ends)
            raise ValueError(f"image_a, image_b: are {shapes}; they must be single images of one size")

        scheduler = scheduler or (None if method == "mix" else "ddim")
        clip = False if method == "inversion" and scheduler in CLAMPING else None
        solver, labels, _ = self._prepare(
            steps, num_inference_steps, output_type, class_labels, guidance_scale, scheduler, clip_sample=clip
        )
        device, dtype = self._execution_device, self._state_dtype
        if generator is None:
            generator = torch.Generator().manual_seed(torch.randint(2**62, ()).item())
        weights = torch.linspace(0, 1, steps, dtype=dtype, device=device).reshape(-1, 1, 1, 1)
        timesteps = solver.timesteps
        if method == "mix":
            visited = timesteps[:: solver.order]  # of order 2, each step looks at two
            if visited[-1] > t:
                raise ValueError(f"t={t} comes before {visited[-1]:g}, the first timestep that so few steps visit")
            timesteps = self._from(solver, int((visited > t).sum()) * solver.order)
            noise = draw_noise(ends[0].shape, generator, device, dtype)
            a, b = (solver.add_noise(end, noise, timesteps[:1]) for end in ends)
            sample = a + weights * (b - a)
        else:
            if method == "slerp":
                a, b = (draw_noise((1, *self.image_shape), generator, device, dtype) for _ in range(2))
            else:
                own = (None, None) if labels is None else (labels[:1], labels[-1:])
                steps_back = self._prepare(
                    None, solver.num_inference_steps, "latent", class_labels, guidance_scale, "ddim", clip_sample=False
                )[0].timesteps
                a, b = (
                    self._invert(end, steps_back, 3, label, guidance_scale, None)
                    for end, label in zip(ends, own, strict=True)
                )
            sample = slerp(a, b, weights) * solver.init_noise_sigma
        alike = [torch.Generator(generator.device).set_state(generator.get_state()) for _ in range(steps)]
        sample = self._denoise(solver, timesteps, sample, alike, labels, guidance_scale, callback_on_step_end)
        return self._output(sample, output_type, return_dict, solver)

    @torch.no_grad()
    def invert(
        self,
        image,
        num_inference_steps: int | None = None,
        iterations: int = 3,
        class_labels=None,
        guidance_scale: float = 1.0,
        callback_on_step_end: Callable | None = None,
    ) -> torch.Tensor:
        """The noise (B, C, H, W) from which DDIM makes these images in as many steps.

        `pipe(latents=pipe.invert(image), scheduler="ddim", clip_sample=False, num_inference_steps=50)` gives the image
        back, nearly. Each step solves the DDIM step (Song et al. 2021, arXiv:2010.02502, equation 12) for its start by
        as many fixed-point `iterations`; the usual inversion is the first of them.

        Args:
            image: as `__call__` takes it.
            num_inference_steps, class_labels, guidance_scale: those with which the images will be made again; `None`:
                50 steps, or all T if they are fewer.
            callback_on_step_end: as `__call__`'s.
        """
        if not isinstance(iterations, Integral) or iterations < 1:
            raise ValueError(f"iterations={iterations!r} must be an integer of at least 1")
        image = self._noiseless("image", image)
        num_inference_steps = self._at_most(50) if num_inference_steps is None else num_inference_steps
        solver, labels, batch_size = self._prepare(
            None, num_inference_steps, "latent", class_labels, guidance_scale, "ddim", image, clip_sample=False
        )
        sample = image.expand(batch_size, -1, -1, -1)
        sample = self._invert(sample, solver.timesteps, iterations, labels, guidance_scale, callback_on_step_end)
        return self._output(sample, "latent", False, solver)[0]

    def _invert(self, sample, timesteps, iterations, labels, guidance_scale, callback) -> torch.Tensor:
        ours = make_solver("ddpm", self.scheduler)
        if ours.alphas_cumprod[int(timesteps[0])] == 0:
            raise ValueError(
                f"nothing of an image is left at timestep {timesteps[0]} (rescale_betas_zero_snr): no way back"
            )
        before = -1
        for i, timestep in enumerate(self.progress_bar(timesteps.flip(0).tolist())):
            target = sample
            for _ in range(iterations):
                output = self._predict(sample.to(self.unet.dtype), timestep, labels, guidance_scale, sample.dtype)
                output = output[:, : sample.shape[1]]
                sample = ours.ddim_start(output, timestep, before, sample, target)
            original = ours.predicted_original(output, timestep, sample)
            tensors = {"sample": sample, "pred_original_sample": original}
            sample, before = self._after_step(callback, i, torch.tensor(timestep), tensors), timestep
            if self.interrupt:
                break
        return sample

    def check_call(
        self, class_labels=None, guidance_scale=1.0, scheduler=None, num_inference_steps=None, clip_sample=None
    ) -> None:
        """A ValueError if a call with these arguments can't be."""
        self._prepare(None, num_inference_steps, "np", class_labels, guidance_scale, scheduler, None, clip_sample)

    # ------------------------------------------------------------------ the walk

    def _prepare(
        self,
        batch_size,
        num_inference_steps,
        output_type,
        class_labels,
        guidance_scale,
        scheduler,
        start=None,
        clip_sample=None,
    ):
        """The solver with its timesteps, the labels (B,) or None, and B; `start`: what is begun with, or None."""
        solver = make_solver(scheduler, self.scheduler, clip_sample)
        self._check_inputs(batch_size, num_inference_steps, output_type)
        if start is not None and batch_size not in (None, len(start)) and len(start) > 1:
            raise ValueError(f"batch_size={batch_size} and {len(start)} images to begin with: give one of them")
        several = len(start) if start is not None and len(start) > 1 else None
        labels = self._labels(class_labels, batch_size or several, guidance_scale)
        if batch_size is None:
            batch_size = several or (1 if labels is None else len(labels))
        set_walk(solver, num_inference_steps, self._execution_device)
        self.interrupt = False
        return solver, labels, batch_size

    def _at_most(self, steps: int) -> int:
        return min(steps, self.scheduler.config.num_train_timesteps)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is sampled"""
        size = self.unet.config.sample_size
        return self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size)

    @property
    def _state_dtype(self) -> torch.dtype:
        # The state stays in float32 whatever the network computes in: a thousand small steps would be rounded away.
        return torch.promote_types(self.unet.dtype, torch.float32)

    def _from(self, solver, first: int) -> torch.Tensor:
        """The timesteps of the walk without the first ones, of which the solver is told."""
        if hasattr(solver, "set_begin_index"):
            solver.set_begin_index(first)
        elif first and isinstance(solver, PNDMScheduler):
            raise ValueError("scheduler: PNDM can't begin in the middle of a walk; another solver can")
        return solver.timesteps[first:]

    def _denoise(self, solver, timesteps, sample, generator, labels, guidance_scale, callback) -> torch.Tensor:
        generator = list(generator) if isinstance(generator, tuple) else generator
        ours = None
        if callback is not None:
            with contextlib.suppress(ValueError):  # betas that ours can't have: then nobody knows the x_0
                ours = make_solver("ddpm", solver)
        for i, timestep in enumerate(self.progress_bar(timesteps)):
            if self.interrupt:
                break
            tensors = self._step(solver, timestep, sample, generator, labels, guidance_scale, ours)
            sample = self._after_step(callback, i, timestep, tensors)
        return sample

    def _step(self, solver, timestep, sample, generator, labels, guidance_scale, ours=None) -> dict:
        """x after one step and the x_0 that it assumed; of solvers that keep that to themselves `ours` knows it."""
        # Some solvers of diffusers draw noise, others would not take a generator.
        takes_generator = "generator" in inspect.signature(solver.step).parameters
        model_input = solver.scale_model_input(sample, timestep)
        model_output = self._predict(model_input.to(self.unet.dtype), timestep, labels, guidance_scale, sample.dtype)
        prediction = model_output[:, : sample.shape[1]]
        learned = solver.config.get("variance_type") == "learned_range"
        of_step = model_output if learned else prediction  # other solvers have no use for the variance
        output = solver.step(of_step, timestep, sample, **({"generator": generator} if takes_generator else {}))
        original = getattr(output, "pred_original_sample", None)
        if original is None and ours is not None:
            original = ours.predicted_original(prediction, round(float(timestep)), model_input)
        return {"sample": output.prev_sample, "pred_original_sample": original}

    def _after_step(self, callback, i: int, timestep, tensors: dict) -> torch.Tensor:
        changed = {} if callback is None else callback(self, i, timestep, tensors) or {}
        return changed.get("sample", tensors["sample"])

    def _output(self, sample, output_type: str, return_dict: bool, solver, convert=to_output):
        """The end of every walk; a `NotFiniteError` tells why too."""
        self.maybe_free_model_hooks()
        try:
            images = convert(sample, output_type)
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

    def _predict(self, sample, timestep, labels, guidance_scale: float, dtype) -> torch.Tensor:
        """The network's output in `dtype`, guided.

        At one x_t the noise, x_0 and v are affine in one another, so it is all the same of which of them this mixture
        is made; the scheduler clamps the x_0 of the mixture. A learned variance is that of the class.
        """
        if labels is None:
            output = self.unet(sample, timestep).sample.to(dtype)
        elif guidance_scale == 1:
            output = self.unet(sample, timestep, class_labels=labels).sample.to(dtype)
        else:
            null = torch.full_like(labels, self.unet.config.num_classes)
            both = self.unet(torch.cat([sample, sample]), timestep, class_labels=torch.cat([labels, null])).sample
            of_class, of_none = both.to(dtype).chunk(2)
            C = sample.shape[1]
            guided = of_none[:, :C] + guidance_scale * (of_class[:, :C] - of_none[:, :C])
            output = torch.cat([guided, of_class[:, C:]], dim=1)
        # A solver that clamps x_0 would make a finite sample, black or white, of an infinity; NaN gets through to the
        # check at the end, and nobody waits for the device here.
        return torch.nan_to_num(output, nan=math.nan, posinf=math.nan, neginf=math.nan)

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


def _repaint_moves(length: int, jump_length: int, num_resamples: int) -> list[int]:
    """-1 (denoise) and 1 (add noise), from the start of a walk of `length` timesteps to the image."""
    jumps = dict.fromkeys(range(0, length - jump_length, jump_length), num_resamples - 1)
    moves, position = [], length - 1
    while position >= 0:
        moves.append(-1)
        position -= 1
        if jumps.get(position, 0) > 0:
            jumps[position] -= 1
            moves += [1] * jump_length
            position += jump_length
    return moves


def slerp(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation (Shoemake 1985) of a and b (1, ...) by weights (B, 1, 1, 1) in 0 ... 1 -> (B, ...).

    Unlike a + w (b - a), it keeps the length that noise has.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle < 1e-4:
        return a + weights * (b - a)
    return (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / torch.sin(angle)


def num_classes(unet) -> int | None:
    """How many classes the network knows, None of an unconditional one."""
    for name in ("num_class_embeds", "class_embed_type"):  # UNet2DModel's, which have no label for no class
        if unet.config.get(name) is not None:
            raise ValueError(f"{name}={unet.config[name]!r}: only DDPMUNet is class-conditional here (num_classes)")
    return unet.config.get("num_classes")


def weight_not_finite(unet) -> str | None:
    """Tells the first weight that holds NaN or infinities; None if there is none among those that are in memory."""
    for name, weight in (*unet.named_parameters(), *unet.named_buffers()):
        if not weight.is_meta and not weight.float().isfinite().all():
            kind = str(weight.dtype).removeprefix("torch.")
            return (
                f"the network's weight {name} ({kind}) is not finite: load weights that are, in a torch_dtype that "
                "holds them"
            )
    return None


def load_pipeline(source: str, name: str, variant: str | None = None) -> DDPMCustomPipeline:
    """`DDPMCustomPipeline.from_pretrained` for commands: what goes wrong is told once, by a ValueError about `name`.

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
