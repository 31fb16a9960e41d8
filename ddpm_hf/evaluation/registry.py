"""The registry of metrics, and what a metric returns.

A metric is a function of a `Context` that returns `Findings`, registered by `@metric`. A new metric is a new module in
`ddpm_hf/evaluation/metrics/`; `evaluate` imports all modules that it finds there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from PIL import Image


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error (None if it has none), and the number of images that it was computed from."""

    value: float
    stderr: float | None
    n: int | None


@dataclass
class Findings:
    """What a metric returns.

    Args:
        rows: entries of evaluation.json by their keys, each made by `record`.
        protocol: how they were measured; the protocol keeps it under the name of the metric.
        pictures: pictures for the report, by name.
        by_timestep: rows of by_timestep.csv.
    """

    rows: dict[str, dict] = field(default_factory=dict)
    protocol: dict = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    by_timestep: list[dict] = field(default_factory=list)

    def add(self, name: str, other: "Findings") -> None:
        """Add what the metric `name` returned."""
        self.rows |= other.rows
        self.protocol |= {name: other.protocol} if other.protocol else {}
        self.pictures |= other.pictures
        self.by_timestep += other.by_timestep


@dataclass(frozen=True)
class Metric:
    measure: Callable[..., Findings]
    needs: tuple[str, ...]


METRICS: dict[str, Metric] = {}  # in the order of evaluation.json


def metric(name: str, *needs: str):
    """Register a function of a `Context` as a metric.

    Args:
        name: the name that selects the metric in `--metrics`.
        needs: "likelihood" (held-out images and the model's forward process), "bound" (a forward process for which bits
            per dimension are defined), "samples", "features" (of samples and
            references) and "logits" (features of a classifier). Only the main process calls a metric that needs
            "samples". All processes call the other metrics, which divide their work with `Context.share`.
    """

    def register(measure: Callable[..., Findings]) -> Callable[..., Findings]:
        METRICS[name] = Metric(measure, needs)
        return measure

    return register


def record(name: str, estimate: Estimate, **more) -> dict:
    """An entry of evaluation.json: the metric's name in words, its estimate, and any other values."""
    values = {"value": estimate.value, "stderr": estimate.stderr, "n": estimate.n, **more}
    lost = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    return {"name": name, **values, **dict.fromkeys(lost)}  # JSON has no infinity


def mean_estimate(values: torch.Tensor) -> Estimate:
    """The mean of values (N,), with its standard error."""
    n = len(values)
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(n) if n > 1 else math.inf, n)
