"""What a picture of the toy world shows: its background and its things, found by template.

This is the toy's *true* measure of whether a picture shows what its text asks for: no learned encoder takes part.
Things of one scene do not touch, and no pattern holds the background's colour, so each thing is one connected patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.subjects import SubjectPrompt
from .world import COLOURS, OVERSAMPLE, RADII, RGB, SHAPES, Scene, Thing, stamp

SMALLEST = 12  # pixels; smaller patches are specks, not things
TEMPLATE = 30  # pixels, height and width of a template; odd and even centres fit
RADIUS_STEP = 0.5  # pixels between templates
RADIUS_RANGE = (5.0, 11.5)
OVERLAP = 0.75  # with its template, for a patch to count as that shape
COLOURS_SHARE = 0.6  # of a patch, in the thing's colours
COLOUR_PRESENT = 0.25  # of a patch in each of the thing's colours, over their number
DIFFERENT = 0.25  # RGB distance from the background at which a pixel belongs to a thing


@dataclass(frozen=True)
class Match:
    """A patch and the template that covers it best."""

    shape: str
    overlap: float  # intersection over union with the best template, 0 to 1
    runner_up: float  # the best overlap of any other shape
    radius: float
    x: float  # of the template's centre, pixels
    y: float
    colours: dict[str, float]  # share of the pixels under the template that are nearest to each palette colour


@lru_cache(maxsize=1)
def _templates() -> tuple[Tensor, list[tuple[str, float, float, float]]]:
    """Masks (K, TEMPLATE, TEMPLATE) of every shape, radius and half-pixel offset; (shape, radius, dx, dy) of each."""
    masks, names, middle = [], [], TEMPLATE // 2
    for shape in SHAPES:
        for radius in np.arange(RADIUS_RANGE[0], RADIUS_RANGE[1] + 1e-9, RADIUS_STEP):
            s = stamp(shape, "plain", float(radius)) > 0
            n = s.shape[0] // 2
            for dy in (0, OVERSAMPLE // 2):
                for dx in (0, OVERSAMPLE // 2):
                    canvas = np.zeros((TEMPLATE * OVERSAMPLE,) * 2, bool)
                    top, left = middle * OVERSAMPLE + dy - n, middle * OVERSAMPLE + dx - n
                    canvas[top : top + 2 * n, left : left + 2 * n] = s
                    cover = canvas.reshape(TEMPLATE, OVERSAMPLE, TEMPLATE, OVERSAMPLE).mean((1, 3))
                    masks.append(cover >= 0.5)
                    names.append((shape, float(radius), dx / OVERSAMPLE, dy / OVERSAMPLE))
    return torch.from_numpy(np.stack(masks)).float(), names


def nearest_colours(images: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest palette colour and the RGB distance to it: (B, 3, H, W) -> (B, H, W) twice."""
    palette = torch.from_numpy(RGB).to(images)
    apart = (images[:, None] - palette[None, :, :, None, None]).square().sum(2).sqrt()  # (B, 8, H, W)
    distance, index = apart.min(1)
    return index, distance


def backgrounds(images: Tensor) -> list[str]:
    """The colour that is nearest to most pixels; things never cover half of a picture."""
    index, _ = nearest_colours(images)
    return [COLOURS[int(i.flatten().bincount(minlength=len(COLOURS)).argmax())] for i in index]


def patches(foreground: Tensor) -> list[Tensor]:
    """Connected patches (4 neighbours) of a mask (H, W) bool, largest first, specks left out."""
    H, W = foreground.shape
    inside = foreground.float()
    label = torch.arange(1, H * W + 1, dtype=torch.float32).reshape(H, W) * inside
    while True:  # the largest number of a patch spreads until it fills the patch
        across, along = (F.max_pool2d(label[None, None], k, 1, p) for k, p in (((1, 3), (0, 1)), ((3, 1), (1, 0))))
        spread = torch.maximum(across, along)[0, 0] * inside
        if torch.equal(spread, label):
            break
        label = spread
    components = [label == v for v in label.unique().tolist() if v > 0]
    return sorted((p for p in components if int(p.sum()) >= SMALLEST), key=lambda p: -int(p.sum()))


def _fit(patch: Tensor, index: Tensor) -> Match:
    masks, names = _templates()
    H, W = patch.shape
    middle = TEMPLATE // 2
    # Correlation with every template at every whole-pixel centre: (K, H + 1, W + 1); [k, i, j] centres it at (i, j).
    padded = F.pad(patch.float()[None, None], (middle,) * 4)
    shared = F.conv2d(padded, masks[:, None])[0]
    overlap = shared / (masks.sum((1, 2))[:, None, None] + patch.sum() - shared)
    best, at = overlap.flatten(1).max(1)
    k = int(best.argmax())
    shape, radius, dx, dy = names[k]
    i, j = divmod(int(at[k]), W + 1)
    covered = F.pad(masks[k], (W,) * 4)[W + middle - i : W + middle - i + H, W + middle - j : W + middle - j + W] > 0
    counts = index[covered].bincount(minlength=len(COLOURS)).double() / max(1, int(covered.sum()))
    others = max(float(b) for b, n in zip(best.tolist(), names) if n[0] != shape)
    shares = {c: float(s) for c, s in zip(COLOURS, counts) if s > 0}
    return Match(shape, float(best[k]), others, radius, j + dx, i + dy, shares)


def things(images: Tensor, most: int = 3) -> list[list[Match]]:
    """The things of each picture, (B, 3, H, W) in [0, 1], largest first, at most `most`."""
    index, _ = nearest_colours(images)
    matches = []
    for x, i, name in zip(images, index, backgrounds(images)):
        apart = (x - torch.from_numpy(RGB[COLOURS.index(name)])[:, None, None]).square().sum(0).sqrt()
        matches.append([_fit(p, i) for p in patches(apart > DIFFERENT)[:most]])
    return matches


def shows(match: Match, thing: Thing) -> tuple[bool, bool]:
    """Whether a patch has the thing's shape, and whether it has its colours: "" stands for any colour, so that of two
    colours of which one is asked for, half of the patch is judged."""
    colours = {thing.colour, thing.second}
    shares = [match.colours.get(c, 0) for c in colours if c]
    present = all(share >= COLOUR_PRESENT / len(colours) for share in shares)
    enough = sum(shares) >= COLOURS_SHARE * len(shares) / len(colours)
    return match.shape == thing.shape and match.overlap >= OVERLAP, present and enough


def obeyed(images: Tensor, scenes: list[Scene]) -> dict[str, Tensor]:
    """What of its scene each picture shows, wherever in the picture it stands: (B,) bool each.

    `background`, `shape` and `colour` (both colours) of the first thing, `second` (shape and colours of the second
    thing; true where the scene has none) and `all`. A patch stands for one thing only. Size, the kind of pattern and
    things that nobody asked for are not judged, nor what is "" in the scene (scenes.describe).
    """
    rows = []
    for name, patches_found, s in zip(backgrounds(images), things(images), scenes):
        judged = [[shows(f, t) for f in patches_found] for t in s.things]
        absent = [(False, False)] * len(s.things)
        ways = permutations(range(len(patches_found) + len(absent)), len(s.things))  # beyond the last: not there
        best = max(([(row + absent)[i] for row, i in zip(judged, way)] for way in ways), key=lambda w: sum(map(sum, w)))
        rows.append((s.background in ("", name), *best[0], all(map(all, best[1:]))))
    columns = torch.tensor(rows).T
    named = dict(zip(("background", "shape", "colour", "second"), columns))
    return named | {"all": columns.all(0)}


def pattern_share(index: Tensor, match: Match, thing: Thing) -> float:
    """How well a thing, pattern and all, explains the patch that has its shape: nearest colours (H, W) -> 0 to 1.

    Of each of the thing's two colours, the share of its pixels that have it; the smaller of the two, at the best of the
    nine whole pixels around the patch's place. Both must be there: most of a dotted thing is its first colour.
    """
    label = _cells(thing, min(RADII.values(), key=lambda r: abs(r - match.radius)))
    around = F.pad(index, (TEMPLATE,) * 4, value=-1)
    top, left = (TEMPLATE + round(v) - TEMPLATE // 2 for v in (match.y, match.x))
    colours = [(label == 1, COLOURS.index(thing.colour)), (label == 2, COLOURS.index(thing.second))]
    best = 0.0
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            seen = around[top + dy : top + dy + TEMPLATE, left + dx : left + dx + TEMPLATE]
            best = max(best, min(float((seen[part] == c).float().mean()) for part, c in colours if part.any()))
    return best


def _cells(thing: Thing, radius: float) -> Tensor:
    """What covers each pixel's larger part, (G, G): 0 outside, 1 first colour, 2 second."""
    s = stamp(thing.shape, thing.pattern, radius)
    n, middle = s.shape[0] // 2, TEMPLATE // 2 * OVERSAMPLE
    canvas = np.zeros((TEMPLATE * OVERSAMPLE,) * 2, np.uint8)
    canvas[middle - n : middle + n, middle - n : middle + n] = s
    cells = (
        canvas.reshape(TEMPLATE, OVERSAMPLE, TEMPLATE, OVERSAMPLE).transpose(0, 2, 1, 3).reshape(TEMPLATE, TEMPLATE, -1)
    )
    counts = np.stack([(cells == k).sum(-1) for k in range(3)], -1)
    return torch.from_numpy(counts.argmax(-1)).float()


SUBJECT_SHARE = 0.75


def placed_as_prompted(images: Tensor, thing: Thing, prompts: list[SubjectPrompt]) -> dict[str, Tensor]:
    """(B,) bool each: the `subject`, shape, colours and pattern, is there once; the prompted `background`; the prompted
    `second` thing, shape and colour (each true where the prompt says nothing of it); `all` of them at once.

    Other things that nobody asked for are not judged.
    """
    rows = []
    index, _ = nearest_colours(images)
    for i, name, matches, placement in zip(index, backgrounds(images), things(images), (p.truth for p in prompts)):
        alike = [shows(f, thing) == (True, True) and pattern_share(i, f, thing) >= SUBJECT_SHARE for f in matches]
        second = placement.second is None or any(all(shows(f, placement.second)) for f in matches)
        rows.append((sum(alike) == 1, placement.background in (None, name), second))
    named = dict(zip(("subject", "background", "second"), torch.tensor(rows).T))
    return named | {"all": torch.stack(list(named.values())).all(0)}


def subject_shares(images: Tensor, thing: Thing, prompts: list[SubjectPrompt]) -> dict[str, float]:
    """Shares of pictures that show what their prompts ask for (`placed_as_prompted`); background and second thing among
    the pictures whose prompts name one (NaN where none does)."""
    seen = placed_as_prompted(images, thing, prompts)
    named = {k: torch.tensor([getattr(p.truth, k) is not None for p in prompts]) for k in ("background", "second")}
    return {k: float((v[named[k]] if k in named else v).float().mean()) for k, v in seen.items()}
