"""Logs a training run: the progress bar, log.csv and, if set, a tracker."""

import csv
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ddpm_hf.utils.files import append, set_aside, write

LOG_EVERY = 10  # updates per row of log.csv
PARTS = 10  # the loss is logged for each of so many equal ranges of timesteps


class TrainingLog:
    """Counts and times the updates of a run.

    Columns of log.csv: `loss` is the mean over the updates since the previous row, without the skipped ones; `loss_t30`
    is the unweighted loss of the timesteps from 0.3 T to 0.4 T (of flow matching: of t from 0.3 to 0.4; of EDM: of
    ln(sigma) from 0.3 to 0.4 of the way from sigma_min to sigma_max); `loader_share` is the fraction of the time for
    loading images and drawing random numbers (on CUDA the device computes meanwhile).

    Args:
        run: a `Run`. In the main process its `log_history` becomes the list of rows, as `read_log` returns them.
        global_batch: images per update.
        kept: keep the rows of an existing log.csv up to this update.
    """

    BY_TIMESTEP = tuple(f"loss_t{100 * k // PARTS:02d}" for k in range(PARTS))
    COUNTED = ("step", "images_seen", "loss", "held_out_loss", "learning_rate", "skipped_updates", *BY_TIMESTEP)
    CLOCKED = ("images_per_second", "loader_share", "seconds")

    def __init__(self, run, global_batch: int, kept: int):
        self.run, self.global_batch, self.accelerator = run, global_batch, run.accelerator
        self.path = run.output_dir / "log.csv"
        self._begin_row()
        self.before = 0.0  # seconds that the run took before it was resumed
        self.images_per_second, self.loss = 0.0, None
        run.log_history = self._cut_back(kept) if self.accelerator.is_main_process else []
        self.started = time.monotonic()
        self.restart_clock()

    def _cut_back(self, step: int) -> list[dict]:
        """Remove the rows of log.csv after update `step` and return the others."""
        columns = self.COUNTED + self.CLOCKED  # earlier versions had other columns
        rows, odd = _rows(self.path) if step and self.path.exists() else ([], None)
        if odd is not None:
            set_aside(self.path, f"line {odd} is not a row of numbers")
        rows = [row for row in rows if int(row["step"]) <= step]
        lines = [",".join(columns), *(",".join(row.get(column) or "" for column in columns) for row in rows)]
        write(self.path, "".join(f"{line}\n" for line in lines))
        if rows:
            self.before = float(rows[-1].get("seconds") or 0)
        return [_numbers({column: row.get(column) for column in columns}) for row in rows]

    def __enter__(self):
        self.bar = tqdm(
            total=self.run.total_steps,
            initial=self.run.step,
            unit=" updates",
            desc=Path(self.run.config.config).stem,
            disable=not self.accelerator.is_main_process,
        )
        return self

    def __exit__(self, *_):
        self.bar.close()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around the code that draws a batch: its time is the `loader_share`."""
        began = time.monotonic()
        yield
        self.loaded += time.monotonic() - began

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around code whose time is not part of `images_per_second`."""
        self.counted.cpu()  # wait for the device
        began = time.monotonic()
        yield
        self.logged_at += time.monotonic() - began

    def restart_clock(self) -> None:
        """Exclude the time since the last row from `images_per_second`."""
        self.logged_at, self.loaded = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """Duration of this run, including the time before it was resumed."""
        return self.before + time.monotonic() - self.started

    def _begin_row(self) -> None:
        self.logged_step, device = self.run.step, self.accelerator.device
        # Sums and counts stay on the device and are read once per row, because reading waits for the device
        self.counted = torch.zeros(2, device=device)
        self.by_timestep = torch.zeros(2, PARTS, device=device)

    def update(
        self, loss: torch.Tensor, seen: list[tuple[torch.Tensor, torch.Tensor]], applied: torch.Tensor, rate: float
    ) -> None:
        """Count an update.

        Args:
            loss: the loss, ().
            seen: for each micro-batch the timesteps (B,) and the mean squared errors of the prediction (B,).
            applied: bool (), false if the update was skipped.
            rate: the learning rate.
        """
        self.bar.update()
        self.rate, skipped = rate, ~applied
        self.counted += torch.stack([loss, torch.ones_like(loss)]).masked_fill(skipped, 0.0)  # NaN * 0 is NaN
        for timesteps, errors in seen:
            parts = self.run.pipeline.scheduler.part_of(timesteps, PARTS)
            counted = torch.stack([errors, torch.ones_like(errors)]).masked_fill(skipped, 0.0)
            self.by_timestep.index_add_(1, parts, counted)

    def write_row(self, held_out: float | None = None) -> float | None:
        """Write a row of log.csv if there was an update since the last one. Returns the loss in the last row."""
        run = self.run
        if run.step == self.logged_step:  # a save just after a row, or a finished run that is resumed
            return self.loss
        total, done = self.accelerator.reduce(self.counted, "mean").tolist()
        self.loss = loss = total / done if done else None
        sums, counts = self.accelerator.reduce(self.by_timestep, "sum").cpu()
        by_timestep = [total / n if n else None for total, n in zip(sums.tolist(), counts.tolist(), strict=True)]
        taken = time.monotonic() - self.logged_at  # `tolist` has waited for the device
        self.images_per_second = (run.step - self.logged_step) * self.global_batch / taken
        row = {
            "step": run.step,
            "images_seen": run.step * self.global_batch,
            "loss": loss,
            "held_out_loss": held_out,
            "learning_rate": self.rate,
            "skipped_updates": run.step - self.logged_step - round(done),
            **dict(zip(self.BY_TIMESTEP, by_timestep, strict=True)),
            "images_per_second": round(self.images_per_second, 1),
            "loader_share": round(self.loaded / taken, 4),
            "seconds": round(self.seconds, 2),
        }
        shown = {"loss": f"{loss:.4f}" if loss is not None else "-", "images/s": f"{self.images_per_second:.0f}"}
        self.bar.set_postfix({**shown, "loader": f"{self.loaded / taken:.1%}"})
        if self.accelerator.is_main_process:
            line = io.StringIO(newline="")
            csv.DictWriter(line, row, lineterminator="\n").writerow(row)
            append(self.path, line.getvalue())
            run.log_history.append(row)
        self.accelerator.log({name: value for name, value in row.items() if value is not None}, step=run.step)
        self._begin_row()
        self.restart_clock()
        return loss


def read_log(path) -> list[dict]:
    """Read log.csv as one dict per row, with None for empty cells. Lines that are not rows of numbers are skipped."""
    rows, _ = _rows(Path(path))
    return [_numbers(row) for row in rows]


def _numbers(row: dict[str, str | None]) -> dict[str, float | None]:
    return {name: float(value) if value else None for name, value in row.items()}


def _rows(path: Path) -> tuple[list[dict[str, str]], int | None]:
    """The rows as text, and the number of the first invalid line or None.

    An incomplete last line, which a killed process leaves, is ignored.
    """
    text = path.read_bytes().decode("utf-8", errors="replace")
    header, *lines = text[: text.rfind("\n") + 1].splitlines() or [""]
    columns, rows, odd = header.split(","), [], None
    if "step" not in columns:
        return [], 1
    for number, line in enumerate(lines, start=2):
        row = dict(zip(columns, line.split(",")))
        try:
            is_row = len(row) == len(columns) == line.count(",") + 1 and _numbers(row)["step"].is_integer()
        except (ValueError, AttributeError):  # a cell is not a number, or there is no step
            is_row = False
        if is_row:
            rows.append(row)
        else:
            odd = odd or number
    return rows, odd
