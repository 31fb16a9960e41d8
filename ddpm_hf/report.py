"""The report of an evaluation to look at: report.html, a page that needs no other file, and report.png, a poster."""

import base64
import io
import math
import os
import re
import textwrap
import warnings
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

PAGE, POSTER = "report.html", "report.png"
PANELS_A_ROW = 4  # of the poster
FEW = 10_000  # samples, below which the bias of a distance is more than its interval
SETS = {"train": "training images", "held_out": "held-out images"}
DISTANCES = {"fid": "Fréchet Inception distance", "fd": "Fréchet distance", "kid": "Kernel distance"}
QUALITIES = ("precision", "recall", "density", "coverage")
BITS = {"bpd": "bound, held out", "bpd_fast": "estimate, held out", "bpd_fast_train": "estimate, training"}
MEMORIZATION = {"memorization_features": "by features", "memorization_pixels": "by pixels"}
DRIFTS = {"channel_mean_drift": "mean", "channel_std_drift": "standard deviation"}
LOSSES = {"loss_held_out": "held-out images", "loss_train": "training images"}
TOGETHER = (  # of these none is shown without the others
    *(tuple(f"{name}_{of}" for name in QUALITIES) for of in SETS),
    ("inception_score", "inception_score_real"),
)
KNOWN = {
    *(f"{name}_{of}" for name in DISTANCES for of in (*SETS, "real")),
    *(name for group in TOGETHER for name in group),
    *(BITS | MEMORIZATION | DRIFTS | LOSSES),
    "bpd_floor",
}
HELD_OUT, TRAIN, REAL, THIRD = "#2f7fd1", "#e07b28", "#8a8f98", "#3a9d6e"  # seen on white as on black
TONES = {"good": "#23804f", "so": "#23272f", "bad": "#c0392b"}
INK, INK_ON_BLACK, FAINT = "#23272f", "#dfe3ea", "#8a8f9855"
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **{"axes.grid": True, "grid.color": FAINT, "axes.axisbelow": True, "legend.frameon": False, "font.size": 9},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11},
    **{"axes.titleweight": "bold", "lines.linewidth": 1.6, "axes.facecolor": "none", "svg.hashsalt": PAGE},
}


def write_report(folder: Path, evaluation: dict, pictures: dict[str, Image.Image], by_timestep: list[dict]) -> None:
    """report.html and report.png, both or neither.

    Args:
        evaluation: "protocol", any nested dictionary, and "metrics", each {"name", "value", "stderr", "n", ...}. What
            is not there is left out; a metric that is not known here stands in a table of its own.
        pictures: "samples", "real" and "memorization", as far as there are any.
        by_timestep: rows {"timestep", "loss_held_out", "loss_train", "bits", "x0_rmse", "x0_slope", "x0_bias"}.
    """
    from matplotlib import rc_context  # takes half a second

    protocol, metrics = evaluation.get("protocol", {}), dict(evaluation.get("metrics", {}))
    withheld = _withhold(metrics)
    pictures = {name: _on_white(picture) for name, picture in pictures.items()}
    panels = _panels(metrics, by_timestep)
    model = protocol.get("model")
    content = {
        "name": str(model.get("name", "A model") if isinstance(model, dict) else model or "A model"),
        "summary": _summary(protocol),
        "cards": _cards(metrics),
        "few": _few(protocol, metrics),
        "protocol": _groups(protocol),
    }
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a name in letters that the poster's font lacks
        files = {
            PAGE: _page(content, metrics, withheld, pictures, panels).encode(),
            POSTER: _poster(content, pictures, panels),
        }
    folder.mkdir(parents=True, exist_ok=True)
    beside = {name: folder / f".{name}" for name in files}
    try:
        for name, data in files.items():
            beside[name].write_bytes(data)
        for name, path in beside.items():
            os.replace(path, folder / name)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- words


def number(metric: dict) -> str:
    """A metric's value with its 95 % interval, as far as there is one, in as many digits as that bears."""
    value, stderr = metric.get("value"), metric.get("stderr")
    if value is None or not math.isfinite(value):
        return "no value"
    half = None if stderr is None else 1.96 * stderr
    if half is None:
        text = f"{value:.4g}"
    elif not math.isfinite(half):
        text = f"{value:.4g} ± unknown"
    elif half == 0 or not 1e-6 < half < 1e6:
        text = f"{value:.4g} ± {half:.2g}"
    else:
        digits = max(0, 1 - math.floor(math.log10(half)))
        text = f"{value:,.{digits}f} ± {half:,.{digits}f}"
    return text.replace("-", "\u2212")


def z_score(metric: dict) -> str:
    return f"{metric['value']:.2f}".replace("-", "\u2212")


def verdict(z: float) -> tuple[str, str]:
    """What the test of nearness says: whether that is "good", "so" or "bad", and in words."""
    if z < -3:
        return "bad", "nearer to the training images than unseen images are: it repeats some of them"
    if z < -2:
        return "so", "perhaps nearer to the training images than unseen images are: look at the pairs"
    if z <= 2:
        return "good", "no nearer to the training images than unseen images are"
    return "so", "farther from the training images than unseen images are: no copies, but unlike the data"


def _has(metrics: dict, key: str) -> bool:
    value = metrics.get(key, {}).get("value")
    return value is not None and math.isfinite(value)


def _withhold(metrics: dict) -> list[str]:
    """Takes out what would stand without its fellows, and says so."""
    said = []
    for group in TOGETHER:
        missing = [key for key in group if not _has(metrics, key)]
        if missing:
            names = [metrics.pop(key).get("name", key) for key in group if key in metrics]
            said += [f"{', '.join(names)} (without {', '.join(missing)})"] if names else []
    return said


def _cards(metrics: dict) -> list[dict]:
    """The numbers to see first, each with the one to compare it with."""
    cards = []
    keys = [f"{name}_{of}" for of in SETS for name in DISTANCES]
    for key in [key for key in keys if _has(metrics, key)][:1]:
        family, of = key.split("_", 1)
        real = f"{family}_real"
        beside = f"held-out real images: {number(metrics[real])}" if _has(metrics, real) else ""
        cards.append({"name": f"{DISTANCES[family]} to {SETS[of]}", "number": number(metrics[key]), "beside": beside})
    if not cards and _has(metrics, "precision_train"):
        both = " and ".join(number(metrics[f"{name}_train"]) for name in QUALITIES[:2])
        cards.append({"name": "Precision and recall", "number": both, "beside": "of training images"})
    for key in [key for key in BITS if _has(metrics, key)][:1]:
        beside = f"floor, of a perfect network: {number(metrics['bpd_floor'])}" if "bpd_floor" in metrics else ""
        if key == "bpd_fast" and "bpd_fast_train" in metrics:
            beside = f"training images: {number(metrics['bpd_fast_train'])}"
        cards.append({"name": f"Bits per dimension: {BITS[key]}", "number": number(metrics[key]), "beside": beside})
    for key in [key for key in MEMORIZATION if _has(metrics, key)][:1]:
        tone, words = verdict(metrics[key]["value"])
        beside = f"Samples are {words}."
        cards.append(
            {
                "name": f"Memorisation, {MEMORIZATION[key]}",
                "number": f"z = {z_score(metrics[key])}",
                "beside": beside,
                "tone": tone,
            }
        )
    return cards


def _tables(metrics: dict) -> dict[str, tuple[list[str], list[tuple[str, list]]]]:
    """Heads, and rows of a title and a metric under each head, None where it was not measured."""
    between = {of: f"samples to {title}" for of, title in SETS.items()} | {"real": "real images: training to held-out"}
    families = [name for name in DISTANCES if any(f"{name}_{of}" in metrics for of in between)]
    judged = [of for of in SETS if f"recall_{of}" in metrics]
    floor = {"floor of this variance": ["bpd_floor"]}
    tables = {
        "distances": (
            [DISTANCES[name] for name in families],
            {title: [f"{name}_{of}" for name in families] for of, title in between.items()},
        ),
        "qualities": (
            [f"against {SETS[of]}" for of in judged],
            {name: [f"{name}_{of}" for of in judged] for name in QUALITIES},
        ),
        "inception_score": (["samples", "real images"], {"Inception Score": list(TOGETHER[-1])}),
        "bits": (["bits/dim"], {title: [key] for key, title in BITS.items()} | floor),
        "losses": (["mean squared error, mean over timesteps"], {title: [key] for key, title in LOSSES.items()}),
        "more": (["value"], {metrics[key].get("name", key): [key] for key in metrics if key not in KNOWN}),
    }
    found = {}
    for key, (heads, rows) in tables.items():
        rows = [(title, [metrics.get(name) for name in names]) for title, names in rows.items()]
        found[key] = heads, [(title, cells) for title, cells in rows if any(cells)]
    return {key: table for key, table in found.items() if table[1]}


def _few(protocol: dict, metrics: dict) -> str | None:
    """What to beware of in numbers of few samples."""
    biased = [key for key in metrics if key.startswith(("fid_", "fd_")) or any(key in group for group in TOGETHER)]
    n = protocol.get("num_samples") or min((metrics[key].get("n") or FEW for key in biased), default=FEW)
    if not biased or n >= FEW:
        return None
    return (
        f"Only {n:,} samples. Fréchet distances of so few are biased upwards, and the intervals (±) do not hold that "
        "bias; precision, recall, density, coverage and Inception Score shift with the number too. "
        f"Compare with numbers of {n:,} samples only, or draw {FEW:,} and more."
    )


def _summary(protocol: dict) -> str:
    words = {"num_samples": "{} samples", "solver": "{}", "num_inference_steps": "{} steps"}
    words |= {"guidance_scale": "guidance {}", "weights": "{} weights", "dtype": "{}", "seed": "seed {}"}
    known = {key: protocol[key] for key in words if isinstance(protocol.get(key), (str, int, float))}
    return " · ".join(words[key].format(_plain(key, value)[0]) for key, value in known.items())


def _groups(values: dict, heading: str = "") -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Nested dictionaries as headings, each with rows of (key, text, whole text)."""
    rows = [(str(key), *_plain(key, value)) for key, value in values.items() if not isinstance(value, dict)]
    groups = [(heading, rows)] if rows else []
    for key, value in values.items():
        if isinstance(value, dict):
            groups += _groups(value, f"{heading} / {key}" if heading else str(key))
    return groups


def _plain(key, value) -> tuple[str, str]:
    """Short, and whole."""
    if isinstance(value, str) and re.fullmatch("[0-9a-fA-F]{32,}", value):
        return f"{value[:12]}…", value
    if isinstance(value, (list, tuple)):
        whole = ", ".join(map(str, value)) or "none"
        return whole if len(value) <= 16 else f"{', '.join(map(str, value[:8]))} … ({len(value):,})", whole
    if value is None or isinstance(value, bool):
        text = {None: "none", True: "yes", False: "no"}[value]
    elif isinstance(value, int) and key != "seed":
        text = f"{value:,}"
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    return text, text


# ---------------------------------------------------------------- curves

Panel = tuple[str, Callable]  # its title, and what draws it on axes


def _panels(metrics: dict, rows: list[dict]) -> dict[str, Panel]:
    """What can be drawn of these numbers."""
    intervals = {
        family: (
            f"{name} (lower is better)",
            {
                f"{family}_train": ("to training", TRAIN),
                f"{family}_held_out": ("to held-out", HELD_OUT),
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
        if any(_has(metrics, name) for name in names)
    }
    if any(_has(metrics, key) for key in BITS):
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
    shown = [(*names[key], metrics[key]) for key in names if _has(metrics, key)]
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
    shown = [key for key in BITS if _has(metrics, key)]
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
    if _has(metrics, "bpd_floor"):
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
    axes.legend(loc="upper left", ncols=3, fontsize=8, columnspacing=1, handlelength=1.2)


def channel_names(number_of: int) -> list[str]:
    return {1: ["gray"], 3: ["red", "green", "blue"]}.get(number_of, [f"channel {c}" for c in range(number_of)])


# ---------------------------------------------------------------- page and poster


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB, small ones enlarged with their pixels kept square."""
    picture = picture.convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    scale = max(1, 700 // picture.width)
    return picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _chart(panel: Panel) -> tuple[str, str, str]:
    """Its title, and it as an image for a white page and for a black one."""
    from matplotlib.figure import Figure  # without pyplot it needs no display and no backend

    figure = Figure(figsize=(4.1, 2.9), layout="constrained", facecolor="none")
    axes = figure.add_subplot()
    panel[1](axes)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    light = buffer.getvalue()
    return panel[0], *(_uri(svg.encode(), "svg+xml") for svg in (light, light.replace(INK, INK_ON_BLACK)))


def _page(content: dict, metrics: dict, withheld: list[str], pictures: dict, panels: dict[str, Panel]) -> str:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"number": number, "verdict": verdict, "z_score": z_score, "channel_names": channel_names}
    uris = {}
    for name, picture in pictures.items():
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        uris[name] = _uri(buffer.getvalue(), "png")
    template = resources.files("ddpm_hf").joinpath("templates/report.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        **content,
        metrics=metrics,
        tables=_tables(metrics),
        withheld=withheld,
        pictures=uris,
        charts={key: _chart(panel) for key, panel in panels.items()},
        memorization=MEMORIZATION,
        drifts=DRIFTS,
    )


def _poster(content: dict, pictures: dict[str, Image.Image], panels: dict[str, Panel]) -> bytes:
    """A PNG, 1600 pixels wide."""
    from matplotlib.figure import Figure

    bands = [(1.1, partial(_draw_title, content=content))]
    if content["cards"]:
        bands.append((1.55, partial(_draw_cards, cards=content["cards"])))
    if content["few"]:
        bands.append(_text_band(content["few"], 10, TRAIN))
    titles = {"samples": "Samples", "real": "Real images", "memorization": "Samples beside the nearest training images"}
    for names in (("samples", "real"), ("memorization",)):
        shown = {titles[name]: pictures[name] for name in names if name in pictures}
        if shown:
            height = min(7.3, 15.4 / len(shown) * max(picture.height / picture.width for picture in shown.values()))
            bands.append((height + 0.5, partial(_draw_pictures, pictures=shown)))
    if panels:
        bands.append((2.9 * math.ceil(len(panels) / PANELS_A_ROW), partial(_draw_panels, panels=panels)))
    if content["protocol"]:
        groups = [(heading, [f"{key} {text}" for key, text, _ in rows]) for heading, rows in content["protocol"]]
        small = "; ".join(f"{heading}: {', '.join(rows)}".removeprefix(": ") for heading, rows in groups)
        bands.append(_text_band(small, 7.5, REAL))
    heights = [height for height, _ in bands]
    figure = Figure(figsize=(16, sum(heights)), dpi=100, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.13, h_pad=0.08)
    for part, (_, draw) in zip(np.ravel(figure.subfigures(len(bands), 1, height_ratios=heights)), bands):
        draw(part)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _text_band(text: str, size: float, colour: str) -> tuple[float, Callable]:
    lines = textwrap.wrap(text, int(15.3 * 72 / (0.56 * size)))
    height = 0.25 + len(lines) * size * 1.35 / 72

    def draw(part):
        _text(part, 0.02, 0.5, "\n".join(lines), fontsize=size, color=colour, va="center", linespacing=1.25)

    return height, draw


def _text(part, x: float, y: float, text: str, **style) -> None:
    part.text(x, y, text, parse_math=False, **style)  # a dollar in a name is a dollar


def _draw_title(part, content: dict) -> None:
    name = " ".join(content["name"].split())
    _text(part, 0.02, 0.62, name, fontsize=min(30, 15.3 * 72 / (0.65 * len(name) + 1)), weight="bold", va="center")
    _text(part, 0.02, 0.15, content["summary"], fontsize=12, color=REAL, va="center")


def _draw_cards(part, cards: list[dict]) -> None:
    each, gap = 0.31, 0.015
    for k, card in enumerate(cards):
        axes = part.add_axes([0.02 + k * (each + gap), 0.06, each, 0.88], xticks=[], yticks=[], facecolor="#f3f5f8")
        axes.spines[:].set_visible(False)
        lines = ((0.82, card["name"], 11, INK), (0.52, card["number"], 23, TONES[card.get("tone", "so")]))
        for y, text, size, colour in (*lines, (0.18, textwrap.fill(card["beside"], 54), 10, INK)):
            axes.text(0.04, y, text, fontsize=size, color=colour, va="center", parse_math=False)


def _draw_pictures(part, pictures: dict[str, Image.Image]) -> None:
    for axes, (title, picture) in zip(np.ravel(part.subplots(1, len(pictures))), pictures.items()):
        axes.imshow(np.asarray(picture), interpolation="antialiased")
        axes.set_title(title, fontsize=12, pad=8)
        axes.axis("off")


def _draw_panels(part, panels: dict[str, Panel]) -> None:
    cells = np.ravel(part.subfigures(math.ceil(len(panels) / PANELS_A_ROW), PANELS_A_ROW))
    for cell, (title, draw) in zip(cells, panels.values()):
        cell.suptitle(title, x=0.05, ha="left", fontsize=10.5, weight="bold")
        draw(cell.add_subplot())
