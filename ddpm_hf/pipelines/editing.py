"""Edits of images by a trained model: `inpaint`, `interpolate` and `invert` of `DDPMCustomPipeline`."""

from collections.abc import Callable
from numbers import Integral

import torch
from diffusers import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ddpm_hf.pipelines.images import from_unit, to_mask, to_unit
from ddpm_hf.schedulers.solvers import CLAMPING, make_solver

INTERPOLATIONS = ("mix", "slerp", "inversion")


class EditingMixin:
    """The methods of `DDPMCustomPipeline` that take images and give images or noise."""

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

        After each step the known part is replaced by the image with as much noise; every `jump_length` steps sampling
        goes back by as many, `num_resamples - 1` times, so that the new part can come to fit the known one. That takes
        up to `num_inference_steps * num_resamples` predictions; 1 resample is plain sampling.

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
        loop = self._prepare(
            num_inference_steps=self._at_most(250) if num_inference_steps is None else num_inference_steps,
            output_type=output_type,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            scheduler="ddpm",
            generator=generator,
            callback=callback_on_step_end,
            start=image,
        )
        solver, image = loop.solver, image.expand(loop.batch_size, -1, -1, -1)
        visited = solver.timesteps.flip(0).tolist()  # upwards; x is at visited[position], -1 being the image
        sample, position, i = loop.draw_noise(image.shape), len(visited) - 1, -1
        moves = repaint_moves(len(visited), jump_length, num_resamples)
        self.num_timesteps = moves.count(-1)
        for move in self.progress_bar(moves):
            timestep, position = visited[position], position + move
            if move > 0:
                sample = solver.renoise(sample, timestep, visited[position], loop.draw_noise(image.shape))
                continue
            tensors, i = loop.step(sample, timestep), i + 1
            known = image
            if position >= 0:
                known = solver.add_noise(image, loop.draw_noise(image.shape), visited[position])
            tensors["sample"] = torch.where(mask, tensors["sample"], known)
            sample = loop.end_step(i, torch.tensor(timestep), tensors)
            if self.interrupt:
                break
        sample = torch.where(mask, sample, image)
        if output_type == "latent":
            return self._output(sample, output_type, return_dict, solver)
        (painted,) = self._output(sample, "pt", False, solver)
        # The known pixels have the bits that were given, which [-1, 1] and back would not give.
        images = from_unit(torch.where(mask, painted, given), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

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
            t: of `"mix"`: the timestep, 0 ... T-1, up to which noise is added; the more, the more is made up. With
                fewer than T steps, the last one visited up to it (a ValueError if there is none).
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
        loop = self._prepare(
            batch_size=steps,
            num_inference_steps=num_inference_steps,
            output_type=output_type,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            generator=generator or torch.Generator().manual_seed(torch.randint(2**62, ()).item()),
            callback=callback_on_step_end,
            clip_sample=False if method == "inversion" and scheduler in CLAMPING else None,
        )
        solver, labels = loop.solver, loop.labels
        weights = torch.linspace(0, 1, steps, dtype=self._state_dtype, device=self._execution_device)
        weights = weights.reshape(-1, 1, 1, 1)
        if method == "mix":
            visited = loop.timesteps[:: solver.order]  # of order 2, each step looks at two
            if visited[-1] > t:
                raise ValueError(f"t={t} comes before {visited[-1]:g}, the first timestep that so few steps visit")
            loop.skip_steps(int((visited > t).sum()))
            noise = loop.draw_noise(ends[0].shape)
            a, b = (solver.add_noise(end, noise, loop.timesteps[:1]) for end in ends)
            sample = a + weights * (b - a)
        else:
            if method == "slerp":
                a, b = (loop.draw_noise((1, *self.image_shape)) for _ in range(2))
            else:
                of_ends = (None, None) if labels is None else (labels[:1], labels[-1:])
                a, b = (
                    self.invert(image, solver.num_inference_steps, class_labels=label, guidance_scale=guidance_scale)
                    for image, label in zip((image_a, image_b), of_ends, strict=True)
                )
            sample = slerp(a, b, weights) * solver.init_noise_sigma
        state = loop.generator.get_state()
        loop.generator = [torch.Generator(loop.generator.device).set_state(state) for _ in range(steps)]
        return self._output(loop.run(sample), output_type, return_dict, solver)

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
        loop = self._prepare(
            num_inference_steps=self._at_most(50) if num_inference_steps is None else num_inference_steps,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            scheduler="ddim",
            callback=callback_on_step_end,
            start=image,
            clip_sample=False,
        )
        ours, timesteps = make_solver("ddpm", self.scheduler), loop.timesteps
        if ours.alphas_cumprod[int(timesteps[0])] == 0:
            raise ValueError(
                f"nothing of an image is left at timestep {timesteps[0]} (rescale_betas_zero_snr): no way back"
            )
        sample, before = image.expand(loop.batch_size, -1, -1, -1), -1
        for i, timestep in enumerate(self.progress_bar(timesteps.flip(0).tolist())):
            target = sample
            for _ in range(iterations):
                output = loop.predict(sample, timestep)[:, : sample.shape[1]]
                sample = ours.ddim_start(output, timestep, before, sample, target)
            original = ours.predicted_original(output, timestep, sample)
            tensors = {"sample": sample, "pred_original_sample": original}
            sample, before = loop.end_step(i, torch.tensor(timestep), tensors), timestep
            if self.interrupt:
                break
        return self._output(sample, "latent", False, loop.solver)[0]

    def _at_most(self, steps: int) -> int:
        return min(steps, self.scheduler.config.num_train_timesteps)


def repaint_moves(length: int, jump_length: int, num_resamples: int) -> list[int]:
    """-1 (denoise) and 1 (add noise), from the first of `length` timesteps to the image."""
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
