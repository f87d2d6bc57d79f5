"""The toy world: small pictures of patterned shapes, with captions, whose true layout is known.

Everything is a function of a seed. A scene is drawn at four times its size and averaged down.
Captions name each attribute only part of the time, so that the text never says all that a picture shows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..data.prompts import Prompts, PromptSource, outpainting_masks, prompt_seed

SIZE = 32  # pixels, height and width
OVERSAMPLE = 4  # a scene is drawn at SIZE·OVERSAMPLE and averaged down

PALETTE = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 220, 50),
    "green": (45, 160, 70),
    "blue": (40, 90, 220),
    "purple": (145, 60, 185),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
COLOURS = tuple(PALETTE)
BYTES = np.array([PALETTE[c] for c in COLOURS], dtype=np.uint8)  # (8, 3)
RGB = BYTES.astype(np.float32) / 255
SHAPES = ("circle", "square", "triangle", "diamond", "star", "ring", "cross")
PATTERNS = ("plain", "striped", "banded", "dotted", "halved")
RADII = {"large": 9.0, "small": 6.0}  # pixels
GRID = 4  # pixels: centres lie on multiples of it, so that a small model can learn to draw sharply
SECOND_OBJECT_SHARE = 0.35
PLAIN_SHARE = 0.45

# What a hurried artist leaves in the hole: washed-out colour under diagonal hatching.
WASH, HATCH = 0.55, 0.22


@dataclass(frozen=True)
class Thing:
    """One object of a scene. Positions and radius in pixels, x to the right, y down."""

    shape: str
    colour: str
    pattern: str
    second: str  # second colour; equals `colour` where the pattern is plain
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]


# ---------------------------------------------------------------------------------------------- making scenes


def _pick(rng: np.random.Generator, options: tuple[str, ...], *without: str) -> str:
    left = [o for o in options if o not in without]
    return left[rng.integers(len(left))]


def _first(radius: float) -> int:
    """The first place of the grid at which a thing of this radius lies wholly inside the picture."""
    return int(np.ceil((radius + 0.5) / GRID))


def _place(rng: np.random.Generator, radius: float) -> float:
    """A coordinate on the grid at which a thing of this radius lies wholly inside the picture."""
    first = _first(radius)
    return float(GRID * rng.integers(first, (SIZE // GRID - first) + 1))


def random_thing(
    rng: np.random.Generator,
    background: str,
    size: str | None = None,
    colours: tuple[str, ...] = COLOURS,
    plain_share: float = PLAIN_SHARE,
) -> Thing:
    """A thing of random attributes that lies wholly inside the picture and differs from its background."""
    size = size or _pick(rng, ("large", "large", "small"))
    radius = RADII[size]
    colour = _pick(rng, colours, background)
    pattern = "plain" if rng.random() < plain_share else _pick(rng, PATTERNS, "plain")
    second = colour if pattern == "plain" else _pick(rng, colours, background, colour)
    return Thing(_pick(rng, SHAPES), colour, pattern, second, size, _place(rng, radius), _place(rng, radius), radius)


def random_scene(
    rng: np.random.Generator,
    colours: tuple[str, ...] = COLOURS,
    two_share: float = SECOND_OBJECT_SHARE,
    plain_share: float = PLAIN_SHARE,
) -> Scene:
    """A scene in three or more of the world's colours: one thing of any size, or two small ones side by side with a gap
    between, the second of them, on the right, plain. Which is which is hard to learn where it can be either way."""
    background = _pick(rng, colours)
    two = rng.random() < two_share
    a = random_thing(rng, background, "small" if two else None, colours, plain_share)
    if not two:
        return Scene(background, (a,))
    b = random_thing(rng, background, "small", colours, plain_share=1.0)
    while (a.shape, a.colour) == (b.shape, b.colour):
        b = random_thing(rng, background, "small", colours, plain_share=1.0)
    left = float(GRID * _first(a.radius))
    return Scene(background, (replace(a, x=left), replace(b, x=SIZE - left)))


# Each purpose has a world of its own (data/prompts.py:prompt_seed). There are finitely many scenes: most of one thing
# in a held-out world also turn up in a long training; scenes of two things, or a scene with its mask, seldom do.


def check_size(size: int) -> None:
    """The toy world is drawn at one size: a model of another cannot complete it."""
    if size != SIZE:
        raise ValueError(
            f"the toy world has pictures of {SIZE} pixels and this model has {size}: name your own pictures"
        )


def scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the world `seed`; the same on every machine."""
    return random_scene(np.random.default_rng([seed, index]))


def scenes(seed: int, start: int, count: int) -> list[Scene]:
    return [scene(seed, i) for i in range(start, start + count)]


def scene_prompts(seed: int, start: int, count: int, size: int = SIZE) -> Prompts:
    """Toy prompts number `start` … of the world `seed`, with PrefPaint's outpainting masks, empty texts and their
    scenes as truth. A `size` other than the world's is refused."""
    check_size(size)
    batch, (masks, kinds) = scenes(seed, start, count), outpainting_masks(seed, start, count, SIZE)
    return Prompts(draw(batch), masks, [""] * count, kinds, batch)


def prompt_source(purpose: str, seed: int, size: int) -> PromptSource:
    """Toy prompts of one purpose, for a model whose pictures have `size` pixels."""
    check_size(size)
    return lambda start, count: scene_prompts(prompt_seed(purpose, seed), start, count, size)


def shown_scene(place: tuple[int, int], masked: Tensor, mask: Tensor) -> Scene:
    """The scene (seed, number) that a rating names; ValueError where its known pixels are not the masked picture's."""
    picture, visible = draw([scene(*place)])[0], (mask < 0.5).expand_as(masked)
    if picture.shape != masked.shape or not torch.allclose(picture[visible], masked[visible], atol=1 / 255):
        raise ValueError(f"scene {list(place)} is not what its masked picture shows: rated in another toy world")
    return scene(*place)


# ---------------------------------------------------------------------------------------------- drawing


@lru_cache(maxsize=4096)
def stamp(shape: str, pattern: str, radius: float) -> np.ndarray:
    """(2R, 2R) uint8 at the drawing size: 0 outside the shape, 1 first colour, 2 second colour."""
    n = int(np.ceil(radius * OVERSAMPLE)) + 1
    axis = (np.arange(-n, n) + 0.5) / (OVERSAMPLE * radius)  # in radii
    x, y = np.meshgrid(axis, axis)
    r = np.hypot(x, y)
    if shape == "circle":
        inside = r < 1
    elif shape == "ring":
        inside = (r < 1) & (r > 0.5)
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) < 0.86
    elif shape == "diamond":
        inside = abs(x) * 1.25 + abs(y) < 1
    elif shape == "cross":
        inside = (np.minimum(abs(x), abs(y)) < 0.32) & (np.maximum(abs(x), abs(y)) < 0.95)
    elif shape == "triangle":
        inside = (y < 0.8) & (abs(x) < (y + 0.95) * 0.57)
    elif shape == "star":  # five points: the radius falls linearly between tip and notch
        phase = np.abs((np.arctan2(x, -y) / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * 2  # 0 at a tip, 1 at a notch
        inside = r < 1.05 * 0.42 / (0.42 + (1 - 0.42) * np.sin(phase * np.pi / 2))
    else:
        raise ValueError(f"unknown shape {shape!r}; choose from {', '.join(SHAPES)}")

    band, dot = 4.0 / radius, 2.0 / radius  # stripes and bands are four pixels wide, dots two, whatever the radius
    if pattern == "plain":
        second = np.zeros_like(inside)
    elif pattern == "striped":  # upright
        second = np.floor(x / band + 0.5) % 2 == 1
    elif pattern == "banded":  # level
        second = np.floor(y / band + 0.5) % 2 == 1
    elif pattern == "dotted":
        second = (np.floor(x / dot) % 2 == 0) & (np.floor(y / dot) % 2 == 0)
    elif pattern == "halved":
        second = x > 0
    else:
        raise ValueError(f"unknown pattern {pattern!r}; choose from {', '.join(PATTERNS)}")
    return (inside * (1 + second)).astype(np.uint8)


def _paint(canvas: np.ndarray, thing: Thing, first: int, second: int) -> None:
    s = stamp(thing.shape, thing.pattern, thing.radius)
    n, big = s.shape[0] // 2, canvas.shape[0]
    top, left = int(thing.y * OVERSAMPLE) - n, int(thing.x * OVERSAMPLE) - n
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + 2 * n, big), min(left + 2 * n, big)
    s = s[y0 - top : y1 - top, x0 - left : x1 - left]
    window = canvas[y0:y1, x0:x1]
    window[s == 1], window[s == 2] = first, second


def draw(batch: list[Scene]) -> Tensor:
    """The pictures: (B, 3, SIZE, SIZE) float32 in [0, 1]."""
    big = SIZE * OVERSAMPLE
    canvas = np.empty((len(batch), big, big), dtype=np.uint8)
    for c, s in zip(canvas, batch):
        c[:] = COLOURS.index(s.background)
        for thing in s.things:
            _paint(c, thing, COLOURS.index(thing.colour), COLOURS.index(thing.second))
    # Rows first: adding whole rows is faster than one mean over both axes. Sixteen bytes fit in sixteen bits.
    rows = BYTES.take(canvas, axis=0).reshape(len(batch), SIZE, OVERSAMPLE, big * 3).sum(2, dtype=np.uint16)
    pixels = rows.reshape(len(batch), SIZE, SIZE, OVERSAMPLE, 3).sum(3, dtype=np.uint16)
    scaled = pixels.astype(np.float32) / (255 * OVERSAMPLE**2)
    return torch.from_numpy(scaled).permute(0, 3, 1, 2).contiguous()


def layout(batch: list[Scene]) -> Tensor:
    """What covers each pixel: (B, SIZE, SIZE) int64; 0 the background, i the i-th thing (counted from 1)."""
    big = SIZE * OVERSAMPLE
    canvas = np.zeros((len(batch), big, big), dtype=np.uint8)
    for c, s in zip(canvas, batch):
        for i, thing in enumerate(s.things, start=1):
            _paint(c, thing, i, i)
    middle = OVERSAMPLE // 2
    return torch.from_numpy(canvas[:, middle::OVERSAMPLE, middle::OVERSAMPLE].astype(np.int64))


def sloppy(images: Tensor) -> Tensor:
    """The same pictures, carelessly done: washed out and hatched. (B, 3, H, W) in [0, 1] -> the same."""
    H, W = images.shape[-2:]
    diagonal = torch.arange(H)[:, None] + torch.arange(W)[None]
    hatch = (diagonal // 2 % 2).to(images)
    return WASH * images + HATCH * hatch


# ---------------------------------------------------------------------------------------------- captions

CAPTION_SHARE = 0.7  # how often each attribute is named


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _describe(thing: Thing, named) -> tuple[str, Thing]:
    """A thing in words, and the thing with "" for each attribute that they leave out."""
    words = [thing.size] if named() else []
    size, plain = " ".join(words), thing.pattern == "plain"
    first = thing.colour if named() else ""
    second = first if plain else (thing.second if first and named() else "")
    words += [" and ".join(dict.fromkeys(c for c in (first, second) if c))] if first else []
    pattern = thing.pattern if (named() and named() and named() if plain else named()) else ""
    words += [pattern] if pattern else []
    described = replace(thing, size=size, colour=first, second=second, pattern=pattern)
    return _article(" ".join(words + [thing.shape])), described


def describe(s: Scene, rng: np.random.Generator | None = None) -> tuple[str, Scene]:
    """A caption that names each attribute with probability CAPTION_SHARE, without `rng` all; and what it says of the
    scene: "" stands for each attribute that it leaves out, and a second thing may be missing."""

    def named() -> bool:
        return rng is None or rng.random() < CAPTION_SHARE

    parts = [_describe(t, named) for t in (s.things if len(s.things) == 1 or named() else s.things[:1])]
    text, background = " and ".join(words for words, _ in parts), s.background if named() else ""
    if background:
        text += f" on {_article(background)} background"
    return text, Scene(background, tuple(described for _, described in parts))


def caption(s: Scene, rng: np.random.Generator | None = None, quality: str | None = None) -> str:
    """The caption of `describe`. `quality` ("clean" or "sloppy") is what CLIP-like training adds to half of its
    captions."""
    text, _ = describe(s, rng)
    return f"a {quality} picture of {text}" if quality else text


WORDS = (
    tuple("a an and of on picture background clean sloppy photo the with in large small".split())
    + COLOURS
    + SHAPES
    + PATTERNS
)
