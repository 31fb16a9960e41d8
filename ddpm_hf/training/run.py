"""A training run as its callbacks see it, and the callbacks."""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

from ddpm_hf.data.dataset import ImageData
from ddpm_hf.data.streaming import ImageStream
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.utils.signals import exit_status


@dataclass
class Run:
    """The state of a training run.

    Args:
        config: the resolved configuration.
        pipeline: the EMA network with its scheduler.
        unet: the network in training, whose weights are the training weights.
        images, held_out: what the network is trained on, and what it is measured on (None where there is one image).
        total_steps: updates in all.
        accelerator: tells which of the processes this is.
        step: updates done.
        metrics: what `TrainCallback.on_evaluate` returned for the network as it is now: dicts of `type`, `name`,
            `value`, `split` and `protocol`.
        log_history: the rows of log.csv so far, in the main process, as `read_log` gives them.
        best: of the save with the lowest held-out loss so far, `step`, `held_out_loss` and `loss`; {} before the first.
        stopped_by: the signal that ended the run before its time, or None.
    """

    config: TrainConfig
    pipeline: DDPMCustomPipeline
    unet: DDPMUNet
    images: ImageData | ImageStream
    held_out: ImageData | None
    total_steps: int
    accelerator: Accelerator
    step: int = 0
    metrics: list[dict] = field(default_factory=list)
    log_history: list[dict] = field(default_factory=list)
    best: dict = field(default_factory=dict)
    stopped_by: str | None = None

    @property
    def exit_status(self) -> int:
        """The exit status of a process that does nothing else: 0, or 128 + the number of the signal received."""
        return exit_status(self.stopped_by) if self.stopped_by else 0

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps


class TrainCallback:
    """What else happens in a run: override the events that you need, which have `transformers.TrainerCallback`'s names.

    The main process alone calls them, but for `on_evaluate`. What a callback finds out it returns from `on_evaluate`;
    `on_save` finds what all of them found out in `run.metrics`.
    """

    def on_init_end(self, run: Run) -> None:
        """All has been checked and nothing has been written yet. An error here leaves no trace of the run."""

    def on_train_begin(self, run: Run) -> None:
        """train_config.json has been written; the first update follows."""

    def on_step_end(self, run: Run) -> None:
        """An update is done."""

    def on_evaluate(self, run: Run) -> list[dict] | None:
        """The network has been saved: measure or draw it. All processes call this one, and wait for each other."""

    def on_save(self, run: Run) -> None:
        """The network has been saved and measured."""

    def on_train_end(self, run: Run) -> None:
        """The run has ended, finished or stopped."""
