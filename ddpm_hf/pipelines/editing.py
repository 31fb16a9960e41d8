"""Image editing: `inpaint`, `interpolate` and `invert` of `DDPMCustomPipeline`."""

from collections.abc import Callable

import torch
from diffusers import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ddpm_hf.pipelines.denoising import CALL, DenoisingLoop
from ddpm_hf.pipelines.images import from_unit, to_mask, to_unit
from ddpm_hf.schedulers.solvers import (
    add_noise,
    nth_timestep,
    own_scheduler,
    scheduler_class,
    start_scale,
)
from ddpm_hf.utils.arguments import check, checked, integer, one_of, show

INTERPOLATIONS = ("mix", "slerp", "inversion")


class EditingMixin:
    """The methods of `DDPMCustomPipeline` that edit images."""

    @checked(CALL)
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
        """Fill the masked region of images (RePaint, Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1).

        After each step, the known region is replaced by `image` with the noise of the new timestep. Every `jump_length`
        steps, sampling goes back `jump_length` timesteps by adding noise, `num_resamples - 1` times, which harmonises
        the two regions. This takes at most `num_inference_steps * num_resamples` network evaluations.

        Args:
            image: see `__call__`. Masked pixels are ignored.
            mask: 1 or True where to fill: (H, W), (B, H, W) or (B, 1, H, W), or a `PIL.Image` that is white there.
            num_inference_steps: `None`: 250, or T if that is less.
            generator and all others: see `__call__`. The solver is our own scheduler with the settings of the
                pipeline's: ancestral steps for a DDPM, Euler steps for a flow and for EDM.

        Returns:
            See `__call__`. The known pixels are exactly those of `image`.
        """
        given = to_unit("image", image, self.unet.config).to(self._execution_device)
        image = given.to(self._state_dtype) * 2 - 1  # (B, C, H, W) in [-1, 1]
        mask = to_mask(mask, image.shape).to(self._execution_device)
        loop = self._prepare(
            num_inference_steps=self._steps_or(250, num_inference_steps),
            output_type=output_type,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            scheduler=scheduler_class(self.scheduler.config).own,
            generator=generator,
            callback=callback_on_step_end,
            start=image,
        )
        image = image.expand(loop.batch_size, -1, -1, -1)
        sample = torch.where(mask, self._repaint(loop, image, mask, jump_length, num_resamples), image)
        if output_type == "latent":
            return self._output(sample, output_type, return_dict, loop.solver)
        (painted,) = self._output(sample, "pt", False, loop.solver)
        # The conversion to [-1, 1] and back would change the last bits of the known pixels.
        images = from_unit(torch.where(mask, painted, given), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _repaint(self, loop: DenoisingLoop, image, mask, jump_length: int, num_resamples: int) -> torch.Tensor:
        """Algorithm 1 of RePaint for `image` (B, C, H, W): x (B, C, H, W) after the last step."""
        solver, shape = loop.solver, image.shape
        visited = solver.timesteps.flip(0).tolist()  # ascending; x is at visited[position], or the image at -1
        sample, position, i = loop.start_noise(shape), len(visited) - 1, -1
        moves = repaint_moves(len(visited), jump_length, num_resamples)
        self.num_timesteps = moves.count(-1)
        for move in self.progress_bar(moves):
            timestep, position = visited[position], position + move
            if move > 0:
                sample = solver.renoise(sample, timestep, visited[position], loop.draw_noise(shape))
                continue
            tensors, i = loop.step(sample, timestep), i + 1
            known = image if position < 0 else solver.add_noise(image, loop.draw_noise(shape), visited[position])
            tensors["sample"] = torch.where(mask, tensors["sample"], known)
            sample = loop.end_step(i, torch.tensor(timestep), tensors)
            if self.interrupt:
                break
        return sample

    @checked(CALL)
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
        """Generate `steps` images that go from one image to another.

        Args:
            image_a, image_b: the two images, see `image` of `__call__`. `"slerp"` takes none: its ends are sampled.
            t: for `"mix"`, the number of the timestep, 0 ... T-1, whose noise is added; a larger t changes the images
                more. With fewer than T steps it is rounded down to a visited timestep.
            method: `"mix"`: the same noise is added to both images, and linear mixtures of them are denoised with the
                same noise (Ho et al. 2020, section 4.3, appendix D). `"slerp"`: sample from spherical interpolations of
                two draws of noise (Song et al. 2021, arXiv:2010.02502, section 5.3). `"inversion"`: the same, of the
                noise that `invert` computes for the two images.
            generator: a single generator, or `None`.
            class_labels: one for all images, or one for each of the `steps`.
            scheduler: see `__call__`; `None`: the pipeline's scheduler for `"mix"`, and for the others DDIM, or
                the Euler steps of a flow or of EDM, which are deterministic too.
            all others: see `__call__`.

        Returns:
            See `__call__`; `steps` images.
        """
        ends = self._check_interpolation(method, generator, t, image_a, image_b)
        kind = scheduler_class(self.scheduler.config)
        scheduler = kind.deterministic if scheduler is None and method != "mix" else scheduler
        loop = self._prepare(
            batch_size=steps,
            num_inference_steps=num_inference_steps,
            output_type=output_type,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            generator=generator or torch.Generator().manual_seed(torch.randint(2**62, ()).item()),
            callback=callback_on_step_end,
            clip_sample=False if method == "inversion" and scheduler in kind.clamping else None,
        )
        solver, labels = loop.solver, loop.labels
        weights = torch.linspace(0, 1, steps, dtype=self._state_dtype, device=self._execution_device)
        weights = weights.reshape(-1, 1, 1, 1)
        if method == "mix":
            a, b = self._noise_ends(loop, ends, t)
            sample = a + weights * (b - a)
        else:
            if method == "slerp":
                a, b = (loop.draw_noise((1, *self.image_shape)) for _ in range(2))
            else:
                end_labels = (None, None) if labels is None else (labels[:1], labels[-1:])
                a, b = (
                    self.invert(image, solver.num_inference_steps, class_labels=label, guidance_scale=guidance_scale)
                    for image, label in zip((image_a, image_b), end_labels, strict=True)
                )
            sample = slerp(a, b, weights) * start_scale(solver)
        # Every image is denoised with the same noise.
        state = loop.generator.get_state()
        loop.generator = [torch.Generator(loop.generator.device).set_state(state) for _ in range(steps)]
        return self._output(loop.run(sample), output_type, return_dict, solver)

    def _check_interpolation(self, method, generator, t, image_a, image_b) -> list[torch.Tensor]:
        """Check the arguments of `interpolate`; return the images given, each (1, C, H, W) in [-1, 1]."""
        check("method", method, one_of(*INTERPOLATIONS))
        if isinstance(generator, list | tuple):
            raise ValueError("generator must be a single generator or None, not a list")
        given = {name: image for name, image in (("image_a", image_a), ("image_b", image_b)) if image is not None}
        if len(given) != (0 if method == "slerp" else 2):
            rule = "takes neither image_a nor image_b" if method == "slerp" else "needs both image_a and image_b"
            raise ValueError(f"method={method!r} {rule}")
        if method == "mix":
            check("t", t, integer(0, self.scheduler.config.num_train_timesteps - 1))
        elif t is not None:
            raise ValueError(f"t={show(t)} must be None with method={method!r}; only method='mix' uses it")
        ends = [self._to_model_range(name, image) for name, image in given.items()]
        if ends and (ends[0].shape != ends[1].shape or len(ends[0]) != 1):
            shapes = " and ".join(str(tuple(end.shape)) for end in ends)
            raise ValueError(f"image_a and image_b have shapes {shapes}; they must be single images of one size")
        return ends

    def _noise_ends(self, loop: DenoisingLoop, ends: list[torch.Tensor], t: int) -> list[torch.Tensor]:
        """Start `loop` at the last visited timestep that is at most t; return `ends` with the same noise of it."""
        visited = loop.timesteps[:: loop.solver.order]  # solvers of order 2 have two timesteps per step
        chosen = nth_timestep(self.scheduler, t)
        if visited[-1] > chosen:
            rule = f"must be at least {visited[-1]:g}, the lowest timestep of num_inference_steps={len(visited)}"
            raise ValueError(f"t={t} {rule}")
        loop.skip_steps(int((visited > chosen).sum()))
        noise = loop.draw_noise(ends[0].shape)
        return [add_noise(loop.solver, end, noise, loop.timesteps[:1]) for end in ends]

    @checked(CALL)
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
        """DDIM inversion: the noise (B, C, H, W) from which DDIM, or Euler for a flow or EDM, generates these images.

        `pipe(latents=pipe.invert(image), scheduler="ddim", clip_sample=False, num_inference_steps=50)` nearly returns
        the image. Each DDIM step (Song et al. 2021, arXiv:2010.02502, equation 12) is inverted by fixed-point
        `iterations`, each one network evaluation; 1 is the usual inversion.

        Args:
            image: see `__call__`.
            num_inference_steps, class_labels, guidance_scale: the values for generating the images again; the default
                number of steps is 50, or T if that is less.
            callback_on_step_end: see `__call__`.
        """
        kind, image = scheduler_class(self.scheduler.config), self._to_model_range("image", image)
        loop = self._prepare(
            num_inference_steps=self._steps_or(50, num_inference_steps),
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            scheduler=kind.deterministic,
            callback=callback_on_step_end,
            start=image,
            clip_sample=False if kind.deterministic in kind.clamping else None,
        )
        ours, timesteps = own_scheduler(self.scheduler), loop.timesteps
        ours.check_invertible(timesteps[0])
        sample, before = image.expand(loop.batch_size, -1, -1, -1), None
        for i, timestep in enumerate(self.progress_bar(timesteps.flip(0).tolist())):
            target = sample
            for _ in range(iterations):
                model_input = ours.scale_model_input(sample, timestep)
                output = loop.predict(model_input, timestep)[:, : sample.shape[1]]
                sample = ours.inverse_step(output, timestep, before, sample, target)
            original = ours.predicted_original(output, timestep, sample)
            tensors = {"sample": sample, "pred_original_sample": original}
            sample, before = loop.end_step(i, torch.tensor(timestep), tensors), timestep
            if self.interrupt:
                break
        return self._output(sample / start_scale(loop.solver), "latent", False, loop.solver)[0]

    def _steps_or(self, default: int, num_inference_steps: int | None) -> int:
        most = min(default, self.scheduler.config.num_train_timesteps)
        return most if num_inference_steps is None else num_inference_steps


def repaint_moves(length: int, jump_length: int, num_resamples: int) -> list[int]:
    """The moves of RePaint from the first of `length` timesteps to the image: -1 denoises, 1 adds noise."""
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
    """Spherical interpolation (Shoemake 1985) of a and b (1, ...) by weights (B, 1, 1, 1) in [0, 1] -> (B, ...).

    Unlike linear interpolation, it keeps the norm of Gaussian noise.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle < 1e-4:
        return a + weights * (b - a)
    return (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / torch.sin(angle)
