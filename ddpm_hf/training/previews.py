"""Draws samples during training, in all processes and within a fraction of the time. Errors do not end the run."""

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache

from ddpm_hf.pipelines.images import to_output
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline
from ddpm_hf.training.run import Run, TrainCallback
from ddpm_hf.utils.distributed import in_all
from ddpm_hf.utils.memory import is_out_of_memory
from ddpm_hf.utils.seeds import image_generators
from ddpm_hf.utils.signals import Stopped, StopSignals, stop_requested

log = logging.getLogger(__name__)


class Previews(TrainCallback):
    """Draws samples in all processes as often as `preview_time_share` allows, and always at the end of training.

    The time of the first preview is estimated from the speed of training, later that of the previous one is used. A
    failure is logged and training continues.

    Args:
        draw: called with the `Run`; returns a list of metrics, or None.
    """

    BACKWARD = 2  # cost of a backward pass in forward passes

    def __init__(self, draw: Callable[[Run], list[dict] | None]):
        self.draw, self.spent, self.last, self.began, self.logged = draw, 0.0, None, time.monotonic(), False

    def on_evaluate(self, run: Run) -> list[dict] | None:
        """Draw if there is time for it."""
        config, expected, share = run.config, self.last, run.config.preview_time_share
        images_per_second = run.log_history[-1]["images_per_second"] if run.log_history else None
        if expected is None and images_per_second:
            passes = 2 * config.eval_batch_size * config.ddpm_num_inference_steps  # EMA and training weights
            passes *= 1 if config.guidance_scale == 1 else 2
            expected = passes / ((1 + self.BACKWARD) * images_per_second)
        elapsed = time.monotonic() - self.began
        allowed = share * elapsed - self.spent
        due = [run.finished or (expected is not None and expected <= allowed)]
        broadcast_object_list(due)  # clocks differ between processes, and only the main one has the log
        if not due[0]:
            if run.accelerator.is_main_process and not self.logged:
                log.warning(
                    f"no samples drawn at update {run.step}: they would take about {expected or 0:.0f} s, but "
                    f"preview_time_share={share:g} of {elapsed:.0f} s leaves {max(0, allowed):.0f} s"
                )
                self.logged = True
            return None
        began, metrics = time.monotonic(), None
        try:
            metrics = self.draw(run)
        except Stopped as stopped:
            log.warning(f"no samples drawn at update {run.step}: {stopped}")
        except Exception as error:
            reason = " ".join(str(error).split())
            log.warning(
                f"drawing samples at update {run.step} failed ({type(error).__name__}: {reason}); training continues"
            )
        self.last = time.monotonic() - began
        self.spent += self.last
        return metrics


def sample_together(
    accelerator: Accelerator,
    pipeline: DDPMCustomPipeline,
    num_images: int,
    num_inference_steps: int,
    seed: int,
    frame_steps: tuple[int, ...] = (),
    class_labels: list[int] | None = None,
    guidance_scale: float = 1.0,
) -> np.ndarray:
    """Sample images in all processes. They do not depend on the number of processes or the batch size.

    Image k has its own generator, seeded with (`seed`, k). Each process halves its batch when memory runs out.

    Args:
        frame_steps: also return x_t after these sampling steps, counted from 0.
        class_labels: the class of each image, for a class-conditional network.
        guidance_scale: see the pipeline.

    Returns:
        (frames + 1, num_images, H, W, C) in [0, 1] in all processes; the last frame is the samples.

    Raises:
        Exception: sampling failed in this process; in the others it is a RuntimeError with that error.
        Stopped: this process was asked to stop.
    """
    own = range(accelerator.process_index, num_images, accelerator.num_processes)

    def sample_own() -> list[tuple[int, np.ndarray]]:
        labels = None if class_labels is None else [class_labels[k] for k in own]
        return list(zip(own, _sample(pipeline, own, num_inference_steps, seed, frame_steps, labels, guidance_scale)))

    made = dict(in_all(sample_own, accelerator))
    return np.stack([made[k] for k in range(num_images)], axis=1)


def _sample(pipeline, numbers: Sequence[int], steps: int, seed, frame_steps, labels, guidance) -> list[np.ndarray]:
    """(frames + 1, H, W, C) in [0, 1] for each image number."""
    done, batch_size = [], len(numbers)
    while len(done) < len(numbers):
        part = slice(len(done), len(done) + batch_size)
        batch, frames = numbers[part], []
        classes = {} if labels is None else {"class_labels": torch.tensor(labels[part]), "guidance_scale": guidance}

        def keep(_, i, timestep, tensors, frames=frames):
            if stop_requested():
                raise Stopped(StopSignals.active.name)
            if i in frame_steps:
                frames.append(to_output(tensors["sample"], "np"))

        try:
            samples = pipeline(
                len(batch),
                generator=image_generators(seed, batch),
                num_inference_steps=steps,
                output_type="np",
                callback_on_step_end=keep,
                **classes,
            ).images
        except Exception as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
            clear_device_cache(garbage_collection=True)
            batch_size = -(-batch_size // 2)
        else:
            done.extend(np.stack([*frames, samples], axis=1))
    return done
