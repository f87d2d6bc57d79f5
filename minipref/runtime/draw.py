"""Figures with Pillow alone: grids of labelled pictures, and panels of curves. All sizes are in pixels.

Pillow's built-in font holds little more than ASCII; other characters are spelled out (é -> e, × -> x, γ -> gamma).
"""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minipref.runtime.checkpoint import atomic_write

Values = Sequence[float] | np.ndarray | Tensor
# Okabe and Ito's colour-blind-safe palette, without its yellow, which is too faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, SOFT, FRAME, LIGHT = "#1a1a1a", "#505050", "#8a8a8a", "#e8e8e8"
FONT = {size: ImageFont.load_default(size=size) for size in (12, 13, 15)}  # ticks and legends, labels, titles
FINE = 3  # shapes are drawn this many times larger, then reduced; text never is, so it stays crisp
SPELLED = "- - - x * <= >= alpha beta gamma delta epsilon eta theta lambda mu pi rho sigma tau phi omega Delta".split()
SPELL = dict(zip("−–—×·≤≥αβγδεηθλμπρστφωΔ", SPELLED))


@dataclass
class Series:
    """One curve, (N,) x and y; `band` is (lo, hi), each (N,), shaded; `points` draws a scatter. NaN leaves a gap."""

    label: str
    x: Values
    y: Values
    band: tuple[Values, Values] | None = None
    points: bool = False


@dataclass
class Panel:
    """One pair of axes; `h_lines` are dashed levels (y, label)."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    y_log: bool = False
    h_lines: list[tuple[float, str]] = field(default_factory=list)


def to_image(x: Tensor, scale: int = 1) -> Image.Image:
    """(3, H, W) or grey (1, H, W) in [0, 1] -> RGB of W·scale x H·scale pixels, nearest neighbour."""
    array = x.detach().float().cpu().nan_to_num().clamp(0, 1).mul(255).round().byte().expand(3, -1, -1)
    image = Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def grid(
    rows: Sequence[tuple[str, list[Tensor] | Tensor]],
    *,
    cell: int = 96,
    title: str = "",
    columns: list[str] | None = None,
) -> Image.Image:
    """Rows of (label, pictures); pictures (3, H, W) or (1, H, W) are shown about `cell` pixels long."""

    def fit(x: Tensor) -> Image.Image:
        image = to_image(x, max(1, int(cell / max(x.shape[-2:]) + 0.5)))
        if max(x.shape[-2:]) > cell:
            image.thumbnail((cell, cell), Image.Resampling.LANCZOS)
        return image

    pad, gap, line, columns = 14, 6, 17, columns or []
    pictures = [[fit(x) for x in row] for _, row in rows]
    labels = [_wrap(label, 150, 13) for label, _ in rows]
    # A slot holds the widest picture and the longest word of a heading, so that no word is cut.
    words = [_width(word, 13) for name in columns for word in name.split()]
    slot = max([p.width for row in pictures for p in row] + words + [0])
    heads = [_wrap(name, slot, 13) for name in columns]
    text = max([_width(s, 13) for label in labels for s in label] + [0])
    left = pad + text + (12 if text else 0)
    width = max(240, left + max([len(row) for row in pictures] + [len(heads)]) * (slot + gap) - gap + pad)
    titles = _wrap(title, width - 2 * pad, 15)
    above = pad + (len(titles) * 19 + 8 if titles else 0)
    top = above + (max(len(h) for h in heads) * line + 4 if heads else 0)
    heights = [max([p.height for p in row] + [len(label) * line]) for row, label in zip(pictures, labels)]
    image = Image.new("RGB", (width, top + sum(heights) + gap * (len(rows) - 1) + pad), "white")
    draw = ImageDraw.Draw(image)
    _text(draw, (pad, pad), titles, 15)
    for i, head in enumerate(heads):
        _text(draw, (left + i * (slot + gap) + slot // 2, top - 4 - len(head) * line), head, 13, SOFT, "m")
    for row, label, tall in zip(pictures, labels, heights):
        _text(draw, (pad, top + (tall - len(label) * line) // 2), label, 13)
        for i, p in enumerate(row):
            x, y = left + i * (slot + gap) + (slot - p.width) // 2, top + (tall - p.height) // 2
            draw.rectangle((x - 1, y - 1, x + p.width, y + p.height), outline="#c8c8c8")
            image.paste(p, (x, y))
        top += tall + gap
    return image


def curves(panels: list[Panel], path: str | Path | None = None) -> Image.Image:
    """Draws the panels in up to three columns; saves the figure where a path is given."""
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    size = (540, 370) if len(panels) == 1 else (420, 310)
    # All panels share their margins, so that the axes of a row and of a column line up.
    left = max([_width(s, 12) for p in panels for s in _y_axis(p)[3]]) + 18 + 24 * any(p.y_label for p in panels)
    head = max([len(_wrap(p.title, size[0] - left - 16, 15)) for p in panels]) * 19 + 12
    images = [_panel(p, size, left, head) for p in panels]
    image = stack([beside(images[i : i + columns], 0) for i in range(0, len(images), columns)], 0)
    if path is not None:
        save(image, path)
    return image


def beside(images: list[Image.Image], gap: int = 12) -> Image.Image:
    """Left to right on white, aligned at the top."""
    out = Image.new("RGB", (sum(i.width + gap for i in images) - gap, max(i.height for i in images)), "white")
    for k, image in enumerate(images):
        out.paste(image, (sum(i.width + gap for i in images[:k]), 0))
    return out


def stack(images: list[Image.Image], gap: int = 12) -> Image.Image:
    """Top to bottom on white, aligned at the left."""
    out = Image.new("RGB", (max(i.width for i in images), sum(i.height + gap for i in images) - gap), "white")
    for k, image in enumerate(images):
        out.paste(image, (0, sum(i.height + gap for i in images[:k])))
    return out


def save(image: Image.Image, path: str | Path, *, flush: bool = True) -> None:
    """Writes the picture in one step; the suffix of the path says the format."""
    encoded = io.BytesIO()  # Pillow does not notice where the system writes a JPEG in part
    image.save(encoded, Image.registered_extensions()[Path(path).suffix.lower()])
    atomic_write(path, lambda p: p.write_bytes(encoded.getvalue()), flush=flush)


def ticks(lo: float, hi: float, count: int = 6) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten within [lo, hi]."""
    least = (hi - lo) / count
    power = math.floor(math.log10(least))
    unit = next(m for m in (1, 2, 5, 10) if m * 10.0**power >= least * (1 - 1e-9))
    step = unit * 10.0**power
    whole = range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1)
    # Dividing by an exact power of ten gives 0.3 where multiplying by 0.1 gives 0.30000000000000004.
    return [k * unit * 10.0**power if power >= 0 else k * unit / 10.0**-power for k in whole]


def log_ticks(lo: float, hi: float, count: int = 6) -> list[float]:
    """Powers of ten within [lo, hi] > 0; 1, 2 and 5 times them, or plain ticks, where the range is narrow."""
    powers = range(math.ceil(math.log10(lo) - 1e-9), math.floor(math.log10(hi) + 1e-9) + 1)
    if len(powers) > 2:
        return [10.0**k for k in powers[:: math.ceil(len(powers) / count)]]
    fine = [m * 10.0**k for k in range(powers.start - 1, powers.stop) for m in (1, 2, 5)]
    fine = [v for v in fine if lo <= v <= hi]
    return fine if len(fine) > 2 else ticks(lo, hi, count)


def numbers(values: list[float]) -> list[str]:
    """Compact labels of an axis: 0.25, 20k, 1.5M, 2e-5."""
    top = max(abs(v) for v in values)
    unit, suffix = (1e6, "M") if 1e6 <= top < 1e10 else (1e3, "k") if 1e4 <= top < 1e6 else (1.0, "")
    return [f"{v / unit:.10g}{suffix if v else ''}".replace("e-0", "e-").replace("e+", "e") for v in values]


def plain(text: str) -> str:
    """The text in ASCII: signs and Greek letters spelled out, accents dropped."""
    text = unicodedata.normalize("NFKD", "".join(SPELL.get(c, c) for c in text))
    return "".join(c for c in text if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def _width(text: str, size: int) -> int:
    return math.ceil(FONT[size].getlength(plain(text)))


def _wrap(text: str, width: int, size: int) -> list[str]:
    """Lines no wider than `width`, but for a word that is wider alone."""
    lines: list[str] = []
    for word in text.split():
        if lines and _width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _text(draw: ImageDraw.ImageDraw, at: tuple, lines: list[str], size: int, colour: str = INK, align: str = "l"):
    """Lines of text from `at` down; `align` says that it lies at their left, middle or right."""
    for i, line in enumerate(lines):
        draw.text((at[0], at[1] + i * (size + 4)), plain(line), colour, FONT[size], align + "a")


def _height(values: Values, log: bool) -> np.ndarray:
    """Values -> positions along an axis, (N,); on a log scale what is not above zero becomes -inf."""
    array = np.asarray(values.detach().double().cpu() if isinstance(values, Tensor) else values, dtype=float).ravel()
    with np.errstate(divide="ignore"):
        return np.log10(np.maximum(array, 0)) if log else array


def _span(values: np.ndarray, pad: float, log: bool = False) -> tuple[float, float]:
    """The range of the finite values with a margin on both sides; a sensible one where they are all equal."""
    lo, hi = (values.min(), values.max()) if len(values := values[np.isfinite(values)]) else (0.0, 1.0)
    narrow = hi - lo <= 1e-9 * max(abs(lo), abs(hi))
    margin = pad * (hi - lo) if not narrow else 1.0 if log else 0.1 * abs(lo) or 1.0
    return float(lo - margin), float(hi + margin)


def _y_axis(panel: Panel) -> tuple[float, float, list[float], list[str]]:
    """-> lowest and highest position, positions of the ticks, their labels."""
    parts = [v for s in panel.series for v in (s.y, *(s.band or ()))] + [[v for v, _ in panel.h_lines]]
    lo, hi = _span(np.concatenate([_height(v, panel.y_log) for v in parts]), 0.06, panel.y_log)
    if not panel.y_log:
        return lo, hi, ticks(lo, hi), numbers(ticks(lo, hi))
    values = log_ticks(10**lo, 10**hi)
    return lo, hi, [math.log10(v) for v in values], [numbers([v])[0] for v in values]


def _runs(ok: np.ndarray) -> list[np.ndarray]:
    """(N,) bool -> the indices of each unbroken run of True."""
    at = np.flatnonzero(ok)
    return [run for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1) if len(run)]


def _ink(image: Image.Image, box: tuple, colour: str, paint: Callable, alpha: float = 1.0) -> np.ndarray:
    """Lays the colour on the box through an enlarged mask that `paint(draw)` fills -> its reduced mask, (h, w)."""
    size = (box[2] - box[0], box[3] - box[1])
    mask = Image.new("L", (size[0] * FINE, size[1] * FINE))
    paint(ImageDraw.Draw(mask))
    mask = mask.resize(size, Image.Resampling.LANCZOS).point(lambda v: v * alpha)
    image.paste(colour, box[:2], mask)
    return np.asarray(mask) / 255


def _strokes(draw: ImageDraw.ImageDraw, runs: Sequence[np.ndarray], radius: float = 3.0) -> None:
    """Runs of (N, 2) pixels: lines with round ends; a run of a single point becomes a dot."""
    for at in runs:
        draw.line([tuple(p) for p in at * FINE], fill=255, width=2 * FINE, joint="curve")
        r = FINE * (radius if len(at) == 1 else 1.0)
        for x, y in at[[0, -1]] * FINE:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)


def _legend(entries: list[tuple[Series, str]], width: int | None) -> Image.Image:
    """Entries (series, colour), one below another in a frame, or side by side in rows of `width`."""
    wide = max(_width(s.label, 12) for s, _ in entries) + 42
    columns = max(1, (width or 0) // wide)
    image = Image.new("RGB", (width or wide, 8 + 17 * math.ceil(len(entries) / columns)), "white")
    draw = ImageDraw.Draw(image)
    if width is None:
        draw.rectangle((0, 0, image.width - 1, image.height - 1), outline=LIGHT)
    for i, (s, colour) in enumerate(entries):
        x, y = 8 + i % columns * wide, 5 + i // columns * 17
        sample = np.array([[10, 8]] if s.points else [[1, 8], [18, 8]])
        _ink(image, (x, y, x + 20, y + 16), colour, lambda d, r=sample: _strokes(d, [r]))
        _text(draw, (x + 26, y), [s.label], 12)
    return image


def _panel(panel: Panel, size: tuple[int, int], left: int, head: int, room: int = 0) -> Image.Image:
    """`room` pixels at the top of the plot hold no data, but a legend that finds no free corner."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    box = (left, head, size[0] - 18, size[1] - 32 - 20 * bool(panel.x_label))
    w, h = box[2] - box[0], box[3] - box[1]
    given = [(s, _height(s.x, False), _height(s.y, panel.y_log)) for s in panel.series]
    drawn = [(s, x, y, ok) for s, x, y in given if (ok := np.isfinite(x) & np.isfinite(y)).any()]
    colours = [PALETTE[i % len(PALETTE)] for i in range(len(drawn))]
    x0, x1 = _span(np.concatenate([x[ok] for _, x, _, ok in drawn] + [np.empty(0)]), 0.03)
    y0, y1, y_at, y_names = _y_axis(panel)
    y1 = y0 + (y1 - y0) * h / (h - room)

    def spot(x, y) -> np.ndarray:
        """-> (N, 2) pixels within the box."""
        x, y = np.broadcast_arrays(x, y)
        return np.stack([(x - x0) / (x1 - x0) * w, np.clip((y1 - y) / (y1 - y0) * h, 0, h)], -1)

    def wide(count: int) -> int:
        return sum(_width(s, 12) + 14 for s in numbers(ticks(x0, x1, count)))

    x_at = ticks(x0, x1, next((n for n in (7, 5, 4, 3) if wide(n) < w), 2))
    for u, name in zip(spot(x_at, y0)[:, 0].round() + box[0], numbers(x_at)):
        draw.line((u, box[1] + room, u, box[3]), LIGHT)
        draw.line((u, box[3], u, box[3] + 4), FRAME)
        _text(draw, (u, box[3] + 7), [name], 12, SOFT, "m")
    for v, name in zip(spot(x0, y_at)[:, 1].round() + box[1], y_names):
        draw.line((box[0], v, box[2], v), LIGHT)
        draw.line((box[0] - 4, v, box[0], v), FRAME)
        draw.text((box[0] - 7, v), name, SOFT, FONT[12], "rm")

    taken = np.zeros((h, w))  # how much lies on each pixel, for labels to keep away from
    taken[:room] = 1
    for (s, x, _, _), colour in zip(drawn, colours):
        lo, hi = (_height(b, panel.y_log) for b in s.band or ((), ()))
        for r in _runs(~np.isnan(lo + hi + x[: len(lo)])):
            edge = np.concatenate([spot(x[r], lo[r]), spot(x[r], hi[r])[::-1]]) * FINE
            mask = _ink(image, box, colour, lambda d, e=edge: d.polygon([tuple(p) for p in e], fill=255), 0.18)
            taken = np.maximum(taken, mask)
    lines = [(float(_height([v], panel.y_log)[0]), name) for v, name in panel.h_lines]
    levels = [(round(spot(x0, v)[1]), name) for v, name in lines if math.isfinite(v)]
    for v, _ in levels:
        for u in range(0, w, 9):
            draw.line((box[0] + u, box[1] + v, min(box[0] + u + 5, box[2]), box[1] + v), SOFT)
        taken[max(v - 1, 0) : v + 2] = 1
    for (s, x, y, ok), colour in zip(drawn, colours):
        runs = np.split(spot(x[ok], y[ok]), ok.sum()) if s.points else [spot(x[r], y[r]) for r in _runs(ok)]
        radius = 2.0 if s.points and len(runs) > 300 else 3.0
        mask = _ink(image, box, colour, lambda d, r=runs, k=radius: _strokes(d, r, k), 0.7 if s.points else 1.0)
        taken = np.maximum(taken, mask)
    draw.rectangle(box, outline=FRAME)

    def place(a: int, b: int, rows: tuple[int, int]) -> tuple[float, int, int]:
        """-> how many pixels of data a box of a x b pixels hides at least, and its (x, y) in the plot then."""
        across = (w - a - 7, 7, (w - a) // 2, (w - a) // 4, 3 * (w - a) // 4)
        inside = [(max(x, 0), y) for y in rows for x in across if 0 <= y <= h - b]
        # The order of preference decides between equals.
        return min(((taken[y : y + b, x : x + a].sum(), x, y) for x, y in inside or [(0, 0)]), key=lambda p: p[0])

    for v, name in levels:
        a, b = _width(name, 12), 16
        _, u, t = place(a, b, (v - 17, v + 2))
        draw.text((box[0] + u, box[1] + t), plain(name), SOFT, FONT[12], "la", stroke_width=2, stroke_fill="white")
        taken[t : t + b, u : u + a] = 1
    entries = [(s, c) for (s, *_), c in zip(drawn, colours) if s.label]
    if entries and room:
        image.paste(_legend(entries, w - 4), (box[0] + 2, box[1] + 2))
    elif entries:
        legend = _legend(entries, None)
        hidden, u, t = place(*legend.size, (7, h - legend.height - 7))
        if hidden > 12 or legend.width > w - 14:
            return _panel(panel, size, left, head, _legend(entries, w - 4).height + 4)
        image.paste(legend, (box[0] + u, box[1] + t))
    if not drawn:
        draw.text((box[0] + w // 2, box[1] + h // 2), "no data", SOFT, FONT[13], "mm")
    titles = _wrap(panel.title, w, 15)
    _text(draw, (box[0] + w // 2, head - 6 - 19 * len(titles)), titles, 15, INK, "m")
    _text(draw, (box[0] + w // 2, box[3] + 27), [panel.x_label], 13, INK, "m")
    tall = Image.new("L", (_width(panel.y_label, 13) or 1, 18))
    ImageDraw.Draw(tall).text((0, 0), plain(panel.y_label), 255, FONT[13])
    tall = tall.transpose(Image.Transpose.ROTATE_90)
    image.paste(INK, (6, box[1] + (h - tall.height) // 2), tall)
    return image
