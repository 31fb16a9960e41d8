"""What the numbers of an evaluation look like: panels, each a title and what draws it on matplotlib's axes."""

import math
from collections.abc import Callable
from functools import partial

from ddpm_hf.comparison import number

DISTANCES = {"fid": "Fréchet Inception distance", "fd": "Fréchet distance", "kid": "Kernel distance"}
QUALITIES = ("precision", "recall", "density", "coverage")
BITS = {"bpd": "bound, held out", "bpd_fast": "estimate, held out", "bpd_fast_train": "estimate, training"}
DRIFTS = {"channel_mean_drift": "mean", "channel_std_drift": "standard deviation"}
LOSSES = {"loss_held_out": "held-out images", "loss_train": "training images"}
HELD_OUT, TRAIN, REAL, THIRD = "#2f7fd1", "#e07b28", "#8a8f98", "#3a9d6e"  # seen on white as on black
INK, INK_ON_BLACK, FAINT = "#23272f", "#dfe3ea", "#8a8f9855"
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **{"axes.grid": True, "grid.color": FAINT, "axes.axisbelow": True, "legend.frameon": False, "font.size": 9},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11},
    **{"axes.titleweight": "bold", "lines.linewidth": 1.6, "axes.facecolor": "none", "svg.hashsalt": "ddpm_hf"},
}

Panel = tuple[str, Callable]  # its title, and what draws it on axes


def has(metrics: dict, key: str) -> bool:
    value = metrics.get(key, {}).get("value")
    return value is not None and math.isfinite(value)


def panels_of(metrics: dict, rows: list[dict]) -> dict[str, Panel]:
    """What can be drawn of these numbers."""
    intervals = {
        family: (
            f"{name} (lower is better)",
            {
                f"{family}_train": ("to training", TRAIN),
                f"{family}_held_out": ("to held-out", HELD_OUT),
                f"{family}_train_matched": ("as many as real", TRAIN),
                f"{family}_real": ("real images", REAL),
            },
        )
        for family, name in DISTANCES.items()
    }
    both = (("train", TRAIN), ("held_out", HELD_OUT))
    names = {f"{name}_{of}": (f"{name}, {of.replace('_', '-')}", colour) for name in QUALITIES for of, colour in both}
    intervals["qualities"] = ("Fidelity and diversity (higher is better)", names)
    names = {"inception_score": ("samples", HELD_OUT), "inception_score_real": ("real images", REAL)}
    intervals["inception_score"] = ("Inception Score (higher is better)", names)
    panels = {
        key: (title, partial(_draw_intervals, metrics=metrics, names=names))
        for key, (title, names) in intervals.items()
        if any(has(metrics, name) for name in names)
    }
    if any(has(metrics, key) for key in BITS):
        panels["bits"] = ("Bits per dimension (lower is better)", partial(_draw_bits, metrics=metrics))
    curves = {
        "loss": ("Loss", {"loss_held_out": "held-out images", "loss_train": "training images"}, None),
        "bits_by_timestep": ("Bits per dimension of each timestep", {"bits": ""}, None),
        "rmse": ("Error of the predicted x0 (RMS)", {"x0_rmse": ""}, 0),
        "slope": ("Slope of the true x0 on the predicted", {"x0_slope": ""}, 1),
        "bias": ("Bias of the predicted x0", {"x0_bias": ""}, 0),
    }
    for key, (title, columns, level) in curves.items():
        lines = {name: _points(rows, column) for column, name in columns.items()}
        if any(lines.values()):
            early = key == "bits_by_timestep"  # most of the bound is there
            panels[key] = (title, partial(_draw_curve, lines=lines, level=level, early=early))
    if any(metrics.get(key, {}).get("channels") for key in DRIFTS):
        panels["drift"] = ("Colour drift: samples less training images", partial(_draw_drift, metrics=metrics))
    return panels


def _points(rows: list[dict], column: str) -> list[tuple[int, float]]:
    found = [(row["timestep"], row.get(column)) for row in rows]
    return sorted((t, value) for t, value in found if value is not None and math.isfinite(value))


def _draw_intervals(axes, metrics: dict, names: dict[str, tuple[str, str]]) -> None:
    shown = [(*names[key], metrics[key]) for key in names if has(metrics, key)]
    gap = "\n" if len(shown) <= 4 else "   "
    for k, (_, colour, metric) in enumerate(shown):
        _dot(axes, metric, -k, colour)
    axes.set_yticks([-k for k in range(len(shown))], [f"{name}{gap}{number(metric)}" for name, _, metric in shown])
    axes.set(ylim=(0.6 - len(shown), 0.6))
    low, high = axes.get_xlim()
    axes.set_xlim(min(0, low), high)
    axes.grid(visible=False, axis="y")


def _dot(axes, metric: dict, y: float, colour: str) -> None:
    half = 1.96 * (metric.get("stderr") or 0)
    half = half if math.isfinite(half) else 0
    axes.plot([0, metric["value"]], [y, y], color=colour, alpha=0.35, linewidth=4, solid_capstyle="butt")
    axes.errorbar(metric["value"], y, xerr=half, fmt="o", color=colour, markersize=6, capsize=4, linewidth=2)


def _draw_bits(axes, metrics: dict) -> None:
    shown = [key for key in BITS if has(metrics, key)]
    for k, key in enumerate(shown):
        metric, left = metrics[key], 0.0
        parts = [(name, metric.get(name)) for name in ("decoder", "kl", "prior")]
        if any(part is None for _, part in parts):
            _dot(axes, metric, -k, TRAIN if key.endswith("train") else HELD_OUT)
            continue
        for (name, part), colour in zip(parts, (THIRD, HELD_OUT, TRAIN)):
            axes.barh(-k, part, 0.4, left, color=colour, label=name)
            left += part
        axes.errorbar(metric["value"], -k, xerr=1.96 * (metric.get("stderr") or 0), color=INK, capsize=4)
    if has(metrics, "bpd_floor"):
        floor = metrics["bpd_floor"]
        axes.axvline(floor["value"], ymax=0.78, color=REAL, linestyle="--", label=f"floor {number(floor)}")
    axes.set_yticks([-k for k in range(len(shown))], [f"{BITS[key]}\n{number(metrics[key])}" for key in shown])
    axes.set(ylim=(0.5 - len(shown), 1.6))
    axes.set_xlim(0)
    axes.grid(visible=False, axis="y")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", ncols=2, fontsize=8, columnspacing=1, handlelength=1.2)


def _draw_curve(axes, lines: dict[str, list], level: float | None, early: bool) -> None:
    """Values against timesteps; `level`: the ideal, drawn dashed, or None and the values are drawn as logarithms."""
    for (name, points), colour in zip(lines.items(), (HELD_OUT, TRAIN)):
        if points:
            axes.plot(*zip(*points), "o-" if len(points) <= 50 else "-", color=colour, markersize=3, label=name)
    if level is not None:
        axes.axhline(level, color=REAL, linestyle="--", linewidth=1.2)
    elif min(value for points in lines.values() for _, value in points) > 0:
        axes.set_yscale("log")
    if early:
        axes.set_xscale("symlog", linthresh=1, linscale=0.3)
        axes.set_xlim(0)
    axes.set(xlabel="timestep (0 has the least noise)")
    if len(lines) > 1:
        axes.legend()


def _draw_drift(axes, metrics: dict) -> None:
    drifts = {name: metrics[key]["channels"] for key, name in DRIFTS.items() if metrics.get(key, {}).get("channels")}
    number_of = max(map(len, drifts.values()))
    axes.axvspan(-2 / 255, 2 / 255, color=FAINT, linewidth=0, label="< 1 of 255 steps")
    for k, (name, values) in enumerate(drifts.items()):
        y = [-c - 0.35 * (k - (len(drifts) - 1) / 2) for c in range(len(values))]
        axes.barh(y, values, 0.32, color=(HELD_OUT, TRAIN)[k], label=name)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks([-c for c in range(number_of)], channel_names(number_of))
    reach = 1.25 * max(2.5 / 255, *(abs(value) for values in drifts.values() for value in values))
    axes.set(xlim=(-reach, reach), ylim=(0.4 - number_of, 1.2), xlabel="pixel values in [\u22121, 1]")
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=5)
    axes.legend(loc="upper left", ncols=3, fontsize=8, columnspacing=1, handlelength=1.2)


def channel_names(number_of: int) -> list[str]:
    return {1: ["gray"], 3: ["red", "green", "blue"]}.get(number_of, [f"channel {c}" for c in range(number_of)])
