"""The charts of an evaluation's report: SVG by matplotlib, for light and for dark pages."""

import io
from collections.abc import Callable

from ddpm_hf.utils.results import number
from ddpm_hf.utils.ticks import plain_ticks

DISTANCES = {"fid": "Fréchet Inception distance", "fd": "Fréchet distance", "kid": "Kernel distance"}
QUALITIES = ("precision", "recall", "density", "coverage")
BITS = {
    "bpd": "bound, held-out images",
    "bpd_fast": "estimate, held-out images",
    "bpd_fast_train": "estimate, training images",
    "bpd_floor": "minimum with this variance",
    "bpd_uniform": "code without any model",
}
DRIFTS = {"channel_mean_drift": "mean", "channel_std_drift": "standard deviation"}
LOSSES = {"loss_held_out": "held-out images", "loss_train": "training images"}
HELD_OUT, TRAIN, REAL = "#2f7fd1", "#e07b28", "#8a8f98"  # legible on white and on black
INK, INK_ON_BLACK, FAINT = "#23272f", "#dfe3ea", "#8a8f9855"
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **{"axes.grid": True, "grid.color": FAINT, "axes.axisbelow": True, "legend.frameon": False, "font.size": 9},
    **{"axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.6, "axes.facecolor": "none"},
    **{"svg.hashsalt": "ddpm_hf"},
}

COMPARED = {
    "train": ("to training", TRAIN),
    "held_out": ("to held-out", HELD_OUT),
    "train_matched": ("equally many", TRAIN),
    "real": ("real images", REAL),
}
# Charts of values with their intervals: title, and the name and colour of each metric.
INTERVALS = {
    family: (f"{name} (lower is better)", {f"{family}_{split}": look for split, look in COMPARED.items()})
    for family, name in DISTANCES.items()
}
INTERVALS["qualities"] = (
    "Fidelity and diversity (higher is better)",
    {
        f"{name}_{split}": (f"{name}, {split.replace('_', '-')}", COMPARED[split][1])
        for name in QUALITIES
        for split in ("train", "held_out")
    },
)
INTERVALS["inception_score"] = (
    "Inception Score (higher is better)",
    {
        "inception_score": ("samples", HELD_OUT),
        "inception_score_real": ("real images", REAL),
    },
)
INTERVALS["bits"] = (
    "Bits per dimension (lower is better)",
    {
        key: (name, TRAIN if key == "bpd_fast_train" else REAL if key in ("bpd_floor", "bpd_uniform") else HELD_OUT)
        for key, name in BITS.items()
    },
)
UNITS = {"qualities": "share of images", "inception_score": "score", "bits": "bits per dimension"}
# Charts over timesteps: title, label of the values, columns of by_timestep.csv with their names, ideal value or None.
CURVES = {
    "loss": ("Loss", "mean squared error", LOSSES, None),
    "bits_by_timestep": ("Bits per dimension of each timestep", "bits per dimension", {"bits": ""}, None),
    "rmse": ("Error of the predicted x0 (RMS)", "difference of pixels in [\u22121, 1]", {"x0_rmse": ""}, 0),
    "slope": ("Slope of the true x0 on the predicted", "slope", {"x0_slope": ""}, 1),
    "bias": ("Bias of the predicted x0", "difference of pixels in [\u22121, 1]", {"x0_bias": ""}, 0),
}


def has(metrics: dict, key: str) -> bool:
    """Whether the metric was measured and its value is a number."""
    return metrics.get(key, {}).get("value") is not None


def draw_charts(metrics: dict, by_timestep: list[dict]) -> dict[str, tuple[str, str, str]]:
    """All charts that have values: {key: (title, SVG for a light page, SVG for a dark page)}.

    Args:
        metrics, by_timestep: see `report.write_report`.
    """
    from matplotlib import rc_context  # takes half a second

    charts = {}
    with rc_context(STYLE):
        for key, (title, names) in INTERVALS.items():
            if any(has(metrics, name) for name in names):
                charts[key] = (title, *_svgs(_draw_intervals, metrics, names, UNITS.get(key, "distance")))
        for key, (title, unit, columns, ideal) in CURVES.items():
            lines = {name: _points(by_timestep, column) for column, name in columns.items()}
            if any(lines.values()):
                early = key == "bits_by_timestep"  # the early timesteps have most of the bound
                charts[key] = (title, *_svgs(_draw_curve, lines, unit, ideal, early))
    return charts


def _svgs(draw: Callable, *args) -> tuple[str, str]:
    """What `draw(axes, *args)` draws, as SVG for a light page and for a dark page."""
    from matplotlib.figure import Figure  # without pyplot, needs no display

    figure, buffer = Figure(figsize=(4.1, 2.9), layout="constrained", facecolor="none"), io.StringIO()
    draw(figure.add_subplot(), *args)
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue(), buffer.getvalue().replace(INK, INK_ON_BLACK)


def _points(rows: list[dict], column: str) -> list[tuple[int, float]]:
    return sorted((row["timestep"], row[column]) for row in rows if row.get(column) is not None)


def _draw_intervals(axes, metrics: dict, names: dict[str, tuple[str, str]], unit: str) -> None:
    shown = [(*names[key], metrics[key]) for key in names if has(metrics, key)]
    gap = "\n" if len(shown) <= 4 else "   "
    for k, (_, colour, metric) in enumerate(shown):
        value, half = metric["value"], 1.96 * (metric.get("stderr") or 0)
        axes.plot([0, value], [-k, -k], color=colour, alpha=0.35, linewidth=4, solid_capstyle="butt")
        axes.errorbar(value, -k, xerr=half, fmt="o", color=colour, markersize=6, capsize=4, linewidth=2)
    axes.set_yticks([-k for k in range(len(shown))], [f"{name}{gap}{number(metric)}" for name, _, metric in shown])
    axes.set(ylim=(0.6 - len(shown), 0.6), xlabel=unit)
    low, high = axes.get_xlim()
    axes.set_xlim(min(0, low), high)
    axes.grid(visible=False, axis="y")
    plain_ticks(axes.xaxis)


def _draw_curve(axes, lines: dict[str, list], unit: str, ideal: float | None, early: bool) -> None:
    """Draw values against timesteps, with a dashed line at the ideal value, or without one on a logarithmic axis."""
    for (name, points), colour in zip(lines.items(), (HELD_OUT, TRAIN)):
        if points:
            axes.plot(*zip(*points), "o-" if len(points) <= 50 else "-", color=colour, markersize=3, label=name)
    if ideal is not None:
        axes.axhline(ideal, color=REAL, linestyle="--", linewidth=1.2)
    elif min(value for points in lines.values() for _, value in points) > 0:
        axes.set_yscale("log")
    if early:
        axes.set_xscale("symlog", linthresh=1, linscale=0.3)
        axes.set_xlim(0)
    axes.set(xlabel="timestep (0 has the least noise)", ylabel=unit)
    plain_ticks(axes.xaxis, axes.yaxis)
    if len(lines) > 1:
        axes.legend()
