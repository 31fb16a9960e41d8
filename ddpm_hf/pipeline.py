"""From noise to images: `DDPMCustomPipeline`."""

import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import logging
from PIL import Image

from ddpm_hf.scheduler import COSINE_SCHEDULE, CosineNoiseScheduler, LinearNoiseScheduler, NoiseScheduler, draw_noise
from ddpm_hf.unet import DDPMUNet

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class DDPMCustomPipeline(DiffusionPipeline):
    """Sampling (Ho et al. 2020, arXiv:2006.11239, algorithm 2), of classes if the network knows some.

    Args:
        unet: the network that predicts the noise (or x_0, or v, as the scheduler's `prediction_type` says).
        scheduler: `LinearNoiseScheduler`, `CosineNoiseScheduler`, or any of diffusers' that is built from their config.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel | DDPMUNet,
        scheduler: LinearNoiseScheduler | CosineNoiseScheduler | KarrasDiffusionSchedulers,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

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
    ) -> ImagePipelineOutput | tuple:
        """Sample images of the network's `sample_size`.

        Args:
            batch_size: images to make; `None`: one a label, or one.
            generator: one generator, from which noise for the whole batch is drawn, or a list of one an image: an
                image then does not depend on the batch it is in.
            num_inference_steps: steps of the walk, 1 ... T; `None`: all T.
            output_type: `"pil"`: a list of `PIL.Image` (1 to 4 channels); `"np"`: (B, H, W, C) float32 in [0, 1];
                `"pt"`: (B, C, H, W) float in [0, 1]; `"latent"`: (B, C, H, W) as the network sees images, nominally
                in [-1, 1] and not clamped.
            callback_on_step_end: called after step i with (pipeline, i, timestep, {"sample": x, "pred_original_sample":
                the x_0 that the step assumed, or None where the scheduler does not tell}); a `"sample"` in the dict
                that it returns takes the place of x.
            class_labels: what to make, of a class-conditional network and of no other: labels or names of classes, one
                for all images or one an image.
            guidance_scale: of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, equation 6, where it is
                1 + w): the prediction without a class plus this many times what the class changes in it. 1: the class
                as it is; more: clearer and less diverse; 0: any class.

        Returns:
            `ImagePipelineOutput` with `images`, or the tuple of it.
        """
        unet, scheduler, device = self.unet, self.scheduler, self._execution_device
        if num_inference_steps is None:
            num_inference_steps = scheduler.config.num_train_timesteps
        self._check_inputs(batch_size, num_inference_steps, output_type)
        labels = self._labels(class_labels, batch_size, guidance_scale)
        if batch_size is None:
            batch_size = 1 if labels is None else len(labels)
        scheduler.set_timesteps(num_inference_steps, device=device)
        # Some solvers of diffusers draw noise, others would not take a generator.
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}

        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        # The state stays in float32 whatever the network computes in: a thousand small steps would be rounded away.
        state_dtype = torch.promote_types(unet.dtype, torch.float32)
        sample = draw_noise((batch_size, unet.config.in_channels, height, width), generator, device, state_dtype)
        sample = sample * scheduler.init_noise_sigma

        for i, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
            model_input = scheduler.scale_model_input(sample, timestep)
            model_output = self._predict(model_input.to(unet.dtype), timestep, labels, guidance_scale, state_dtype)
            output = scheduler.step(model_output, timestep, sample, **step_kwargs)
            sample = output.prev_sample
            if callback_on_step_end is not None:
                tensors = {"sample": sample, "pred_original_sample": getattr(output, "pred_original_sample", None)}
                sample = (callback_on_step_end(self, i, timestep, tensors) or {}).get("sample", sample)

        self.maybe_free_model_hooks()
        images = to_output(sample, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, sample, timestep, labels, guidance_scale: float, dtype) -> torch.Tensor:
        """The network's output in `dtype`, guided.

        At one x_t the noise, x_0 and v are affine in one another, so it is all the same of which of them this mixture
        is made; the scheduler clamps the x_0 of the mixture.
        """
        if labels is None:
            return self.unet(sample, timestep).sample.to(dtype)
        if guidance_scale == 1:
            return self.unet(sample, timestep, class_labels=labels).sample.to(dtype)
        null = torch.full_like(labels, self.unet.config.num_classes)
        both = self.unet(torch.cat([sample, sample]), timestep, class_labels=torch.cat([labels, null])).sample
        of_class, of_none = both.to(dtype).chunk(2)
        return of_none + guidance_scale * (of_class - of_none)

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

    def _check_inputs(self, batch_size, num_inference_steps, output_type) -> None:
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"batch_size={batch_size!r} must be an integer of at least 1")
        most = self.scheduler.config.num_train_timesteps  # beyond it diffusers' solvers give noise and no error
        if not isinstance(num_inference_steps, Integral) or not 1 <= num_inference_steps <= most:
            raise ValueError(f"num_inference_steps={num_inference_steps!r} must be an integer in 1 ... {most}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}; choose from {', '.join(OUTPUT_TYPES)}")
        channels = self.unet.config.in_channels
        if output_type == "pil" and channels not in PIL_MODES:
            raise ValueError(f"output_type='pil' shows 1 to 4 channels, not {channels}: use output_type='np' or 'pt'")


def scheduler_class(config: dict) -> type[NoiseScheduler]:
    """Ours that a configuration, of ours or of diffusers' DDPM scheduler, asks for by its `beta_schedule`."""
    cosine = config.get("beta_schedule") == COSINE_SCHEDULE and config.get("trained_betas") is None
    return CosineNoiseScheduler if cosine else LinearNoiseScheduler


def num_classes(unet) -> int | None:
    """How many classes the network knows, None of an unconditional one."""
    for name in ("num_class_embeds", "class_embed_type"):  # UNet2DModel's, which have no label for no class
        if unet.config.get(name) is not None:
            raise ValueError(f"{name}={unet.config[name]!r}: only DDPMUNet is class-conditional here (num_classes)")
    return unet.config.get("num_classes")


def load_pipeline(source: str, name: str) -> DDPMCustomPipeline:
    """`DDPMCustomPipeline.from_pretrained` for commands: what goes wrong is told once, by a ValueError about `name`."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        return DDPMCustomPipeline.from_pretrained(source)
    except Exception as error:  # the loader, the Hub and the network all raise their own
        raise ValueError(f"{name}={source!r} can't be loaded: {error}") from error
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def to_output(sample: torch.Tensor, output_type: str):
    """(B, C, H, W) as the network sees images, [-1, 1] -> what `DDPMCustomPipeline` returns for `output_type`."""
    if output_type == "latent":
        return sample
    images = (sample / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    images = images.float().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, C)
    return images if output_type == "np" else to_pil(images)


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """(B, H, W, C) in [0, 1] with C of 1, 2, 3 or 4 -> PIL images of 8 bits a channel."""
    pixels = (images * 255).round().astype(np.uint8)
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]
