"""The report of an evaluation to look at: report.html, a page that needs no other file, and report.png, a poster."""

import base64
import io
import math
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

from ddpm_hf.charts import (
    BITS,
    DISTANCES,
    DRIFTS,
    INK,
    INK_ON_BLACK,
    LOSSES,
    QUALITIES,
    REAL,
    STYLE,
    TRAIN,
    Panel,
    channel_names,
    has,
    panels_of,
)
from ddpm_hf.comparison import number
from ddpm_hf.files import write

PAGE, POSTER = "report.html", "report.png"
PANELS_A_ROW = 4  # of the poster
FEW = 10_000  # samples, below which the bias of a distance is more than its interval
SETS = {"train": "training images", "held_out": "held-out images"}
MEMORIZATION = {"memorization_features": "by features", "memorization_pixels": "by pixels"}
TOGETHER = (  # of these none is shown without the others
    *(tuple(f"{name}_{of}" for name in QUALITIES) for of in SETS),
    ("inception_score", "inception_score_real"),
)
KNOWN = {
    *(f"{name}_{of}" for name in DISTANCES for of in (*SETS, "train_matched", "real")),
    "inception_score_matched",
    *(name for group in TOGETHER for name in group),
    *(BITS | MEMORIZATION | DRIFTS | LOSSES),
    "bpd_floor",
}
TONES = {"good": "#23804f", "so": "#23272f", "bad": "#c0392b"}


def write_report(
    folder: Path, evaluation: dict, pictures: dict[str, Image.Image], by_timestep: list[dict], prefix: str = ""
) -> None:
    """report.html and report.png, both or neither, their names after `prefix`.

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
    panels = panels_of(metrics, by_timestep)
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
            prefix + PAGE: _page(content, metrics, withheld, pictures, panels).encode(),
            prefix + POSTER: _poster(content, pictures, panels),
        }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write(folder / name, data)


# ---------------------------------------------------------------- words


def z_score(metric: dict) -> str:
    return f"{metric['value']:.2f}".replace("-", "\u2212")


def verdict(metric: dict) -> tuple[str, str]:
    """What the test of nearness says: whether that is "good", "so" or "bad", and in words."""
    z, copies = metric["value"], metric.get("copies") or 0.0
    if copies > max(0.01, 2 * (metric.get("copies_held_out") or 0.0)):
        return "bad", f"copies of training images in {copies:.1%} of all cases: the nearest is far nearer than the next"
    if z < -3:
        return "so", (
            "nearer to the training images than unseen images are: copies, or smoother or paler than real ones; look "
            "at the pairs"
        )
    if z < -2:
        return "so", "perhaps nearer to the training images than unseen images are: look at the pairs"
    if z <= 2:
        return "good", "no nearer to the training images than unseen images are"
    return "so", "farther from the training images than unseen images are: no copies, but unlike the data"


def _withhold(metrics: dict) -> list[str]:
    """Takes out what would stand without its fellows, and says so."""
    said = []
    for group in TOGETHER:
        missing = [key for key in group if not has(metrics, key)]
        if missing:
            names = [metrics.pop(key).get("name", key) for key in group if key in metrics]
            said += [f"{', '.join(names)} (without {', '.join(missing)})"] if names else []
    return said


def _cards(metrics: dict) -> list[dict]:
    """The numbers to see first, each with the one to compare it with."""
    cards = []
    keys = [f"{name}_{of}" for of in SETS for name in DISTANCES]
    for key in [key for key in keys if has(metrics, key)][:1]:
        family, of = key.split("_", 1)
        real = f"{family}_real"
        beside, matched = "", f"{key}_matched"
        if has(metrics, real) and has(metrics, matched):
            beside = f"of {metrics[real]['n']:,}: samples {number(metrics[matched])}, held-out {number(metrics[real])}"
        elif has(metrics, real):
            beside = f"held-out real images: {number(metrics[real])}"
        cards.append({"name": f"{DISTANCES[family]} to {SETS[of]}", "number": number(metrics[key]), "beside": beside})
    if not cards and has(metrics, "precision_train"):
        both = " and ".join(number(metrics[f"{name}_train"]) for name in QUALITIES[:2])
        cards.append({"name": "Precision and recall", "number": both, "beside": "of training images"})
    for key in [key for key in BITS if has(metrics, key)][:1]:
        beside = f"of which the fixed variance costs {number(metrics['bpd_floor'])}" if "bpd_floor" in metrics else ""
        if key == "bpd_fast" and "bpd_fast_train" in metrics:
            beside = f"training images: {number(metrics['bpd_fast_train'])}"
        cards.append({"name": f"Bits per dimension: {BITS[key]}", "number": number(metrics[key]), "beside": beside})
    for key in [key for key in MEMORIZATION if has(metrics, key)][:1]:
        tone, words = verdict(metrics[key])
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
    between = {of: f"samples to {title}" for of, title in SETS.items()}
    between |= {
        "train_matched": "as many samples as held-out images, to training images",
        "real": "real images: held-out to training",
    }
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
        "inception_score": (
            ["samples", "as many samples as real images", "real images"],
            {"Inception Score": ["inception_score", "inception_score_matched", "inception_score_real"]},
        ),
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
