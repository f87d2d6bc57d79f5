"""Rated completions on disk: the project's `ratings.jsonl` and the layout of PrefPaint's release.

ratings.jsonl, one JSON object a line, paths relative to the file:

    {"image": "images/7_0.png", "masked": "masked/7.png", "mask": "masks/7.png", "prompt_id": "7",
     "scores": {"structure": 5, "texture": 6, "overall": 5}}

"scores" is one rating or a list of them, one a rater (repeated ratings tell how noisy raters are). Optional: "kind" of
mask and "source" of picture, by which labels are normalised; "mask" (else the hole is where `masked` and `image`
differ); "origin" ("completion", or "widened" where a picture was spoilt or mended by hand); "scene" (seed, number) of a
toy scene, so that its true rating is known.

PrefPaint's layout: inpaint/ID_k.png, masks/ID_mask.png (white = hole), masks_color/ID_mask_color.png, and JSON files
that hold {"ID_k": [score, rank], …}, flat or grouped by ID.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short  # a message shows no more of a value than it needs
from typing import Any

import torch
from torch import Tensor

from ..runtime.checkpoint import write_text
from ..runtime.config import several
from ..runtime.draw import save, to_image
from ..runtime.runlog import read_text
from .pictures import picture_size, read_image, read_mask
from .prompts import Prompts
from .ratings import HIGHEST, LOWEST, WEIGHTS, Ratings

# ((seed, number) of a row's scene, masked picture (3, S, S), mask (1, S, S)) -> truth; ValueError if it is another's.
Truth = Callable[[tuple[int, int], Tensor, Tensor], Any]
STRANGE = 0.2  # mean difference of known pixels at which a completion is that of another picture
ORIGINS = ("completion", "widened")


@dataclass(frozen=True)
class Row:
    """One rated picture on disk, and where it was read (file and line, or key)."""

    where: str
    image: Path
    masked: Path
    mask: Path | None
    prompt_id: str
    labels: tuple[float, ...]  # one a rater, 0.15·structure + 0.15·texture + 0.7·overall
    kind: str = ""
    source: str = ""
    origin: str = "completion"
    scene: tuple[int, int] | None = None


# ------------------------------------------------------------------------------------------------ writing


def write(
    folder: str | Path,
    prompts: Prompts,
    images: Tensor,
    scores: list[dict[str, Tensor]],
    prompt_ids: list[str],
    *,
    widened: Tensor,
    source: str,
    scenes: list[tuple[int, int]] | None = None,
) -> Path:
    """Adds rated pictures to a folder: PNG files and lines of ratings.jsonl. Returns the path of ratings.jsonl.

    prompts and images (N, 3, H, W); for each rater the scores (N,) of structure, texture and overall; N prompt ids; the
    N toy scenes as (seed, number). The lines are written last and at once, so that a broken run leaves nothing half.
    """
    folder = Path(folder)
    for part in ("images", "masked", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    path = folder / "ratings.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    taken = {json.loads(line)["prompt_id"] for line in lines}
    if twice := sorted(taken & set(prompt_ids)):
        raise ValueError(f"{path}: prompt {twice[0]} was rated before; write to another folder")
    masked, seen = prompts.masked, dict[str, int]()
    for i, name in enumerate(prompt_ids):
        k = seen[name] = seen.get(name, -1) + 1
        row: dict = {"image": f"images/{name}_{k}.png", "masked": f"masked/{name}.png", "mask": f"masks/{name}.png"}
        pictures = {"image": images[i]} | ({"masked": masked[i], "mask": prompts.masks[i]} if k == 0 else {})
        for key, x in pictures.items():
            save(to_image(x), folder / row[key], flush=False)
        each = [{part: float(rater[part][i]) for part in WEIGHTS} for rater in scores]
        row |= {"prompt_id": name, "kind": prompts.kinds[i], "source": source, "scores": each}
        row |= {"origin": "widened"} if widened[i] else {}
        row |= {"scene": list(scenes[i])} if scenes else {}
        lines.append(json.dumps(row))
    write_text(path, "\n".join(lines) + "\n")
    return path


# ------------------------------------------------------------------------------------------------ reading


def _number(value, what: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f"{what} is {short(value)}, expected a number from {low:g} to {high:g}")
    if not low <= value <= high:  # exact for integers of any length
        raise ValueError(f"{what} is {str(value)[:20]}, outside {low:g} to {high:g}")
    return float(value)


def _label(scores, low: float, high: float) -> float:
    if not isinstance(scores, dict) or set(scores) != set(WEIGHTS):
        raise ValueError(f"scores {short(scores)}: expected {', '.join(WEIGHTS)}")
    return sum(w * _number(scores[part], f"the score of {part}", low, high) for part, w in WEIGHTS.items())


def _below(root: Path, name: str) -> Path:
    """A file of a data set, named relative to `root`, with slashes or backslashes; never one outside of it."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0].endswith(":") or parts[0] == "" or "\0" in name:
        raise ValueError(f"{short(name)} does not lie in the folder of the ratings; name files relative to it")
    return root.joinpath(*parts)


def _jsonl_row(line: str, where: str, root: Path, low: float, high: float) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not a JSON object ({e})") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    missing = [k for k in ("image", "masked", "prompt_id", "scores") if row.get(k) is None]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    ratings = row["scores"] if isinstance(row["scores"], list) else [row["scores"]]
    if not ratings:
        raise ValueError("has no scores")
    scene = row.get("scene")
    numbers = isinstance(scene, list) and len(scene) == 2 and all(type(v) is int and v >= 0 for v in scene)
    if scene is not None and not numbers:
        raise ValueError(f"scene {short(scene)}: expected [seed, number], both 0 or more")
    if row.get("origin", ORIGINS[0]) not in ORIGINS:
        raise ValueError(f"origin {short(row['origin'])}: expected {' or '.join(ORIGINS)}")
    return Row(
        where,
        _below(root, str(row["image"])),
        _below(root, str(row["masked"])),
        _below(root, str(row["mask"])) if row.get("mask") else None,
        str(row["prompt_id"]),
        tuple(_label(s, low, high) for s in ratings),
        str(row.get("kind", "")),
        str(row.get("source", "")),
        str(row.get("origin", "completion")),
        (scene[0], scene[1]) if scene else None,
    )


class _Pairs(list):
    """A JSON object as (key, value) pairs."""


def _prefpaint_rows(file: Path, root: Path, low: float, high: float) -> tuple[list[Row], list[str]]:
    text = read_text(file)
    try:  # objects as lists of pairs: a dictionary would drop ids that stand there twice
        content = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: not readable as JSON, cut short or damaged ({e})") from None
    if not isinstance(content, _Pairs):
        raise ValueError(f"{file}: expected an object of ratings, {{'ID_k': [score, rank]}}")
    flat: list[tuple[str, object]] = []
    for key, value in content:
        flat += value if isinstance(value, _Pairs) else [(key, value)]
    rows, problems = [], []
    for key, value in flat:
        where, name = f"{file}: {key}", key.rpartition("_")[0]
        try:
            if not name:
                raise ValueError("expected a key ID_k, a prompt and the number of its completion")
            if not isinstance(value, list) or len(value) != 2:
                raise ValueError(f"{short(value)}: expected [score, rank]")
            label = _number(value[0], "the score", low, high)
            source = (re.match(r"[A-Za-z_]*", name) or [""])[0].strip("_")
            image, masked = _below(root, f"inpaint/{key}.png"), _below(root, f"masks_color/{name}_mask_color.png")
            mask = _below(root, f"masks/{name}_mask.png")
            rows.append(Row(where, image, masked, mask, name, (label,), source=source))
        except ValueError as e:
            problems.append(f"{where}: {e}")
    return rows, problems


def _files(path: Path) -> list[tuple[Path, Path]]:
    """The rating files that a path means, each with the folder that its pictures are relative to."""
    if path.is_file():
        return [(path, path.parent)]
    if (path / "ratings.jsonl").is_file():
        return [(path / "ratings.jsonl", path)]
    if (path / "inpaint").is_dir():
        return [(f, path) for f in sorted(path.glob("*.json"))]
    return [(f, f.parent) for f in sorted(path.glob("ratings*/ratings.jsonl"))]  # a run of train_reward.py


def _folders(paths: str | Path | list[Path]) -> list[Path]:
    """Text is what a user gave, and may name several; a path is one, whatever its name."""
    if isinstance(paths, str):
        return [Path(x) for x in several(paths)]
    return paths if isinstance(paths, list) else [paths]


def scan(paths: str | Path | list[Path], low: float = LOWEST, high: float = HIGHEST) -> tuple[list[Row], list[str]]:
    """The rows of a folder of ratings, or of several (a list, or text A,B), and one line for each row that is left out.

    Raises FileNotFoundError or ValueError where there is nothing that can be read at all.
    """
    if not low < high:
        raise ValueError(f"scores from {low:g} to {high:g}: the lowest must be smaller than the highest")
    rows: list[Row] = []
    problems: list[str] = []
    for part in _folders(paths):
        if not part.exists():
            raise FileNotFoundError(f"{part}: no such folder of ratings")
        files = _files(part)
        if not files:
            raise ValueError(f"{part}: holds neither ratings.jsonl nor JSON files beside inpaint/ and masks/")
        for file, root in files:
            if file.suffix != ".jsonl":
                own, bad = _prefpaint_rows(file, root, low, high)
                rows, problems = rows + own, problems + bad
                continue
            for i, line in enumerate(read_text(file).split("\n"), start=1):  # splitlines would cut at U+2028, too
                try:
                    if line.strip():
                        rows.append(_jsonl_row(line, f"{file}:{i}", root, low, high))
                except ValueError as e:
                    problems.append(f"{file}:{i}: {e}")
    usable, first = [], dict[Path, str]()
    for row in rows:
        if row.image in first:
            problems.append(f"{row.where}: {row.image.name} was rated before, at {first[row.image]}")
            continue
        first[row.image] = row.where
        lacking = [p for p in (row.image, row.masked, row.mask) if p is not None and not os.path.isfile(p)]
        if lacking:
            problems.append(f"{row.where}: {lacking[0]} is missing")
            continue
        usable.append(row)
    return usable, problems


def mask_kind(mask: Tensor) -> str:
    """What kind of hole a mask (1, H, W) has, by its outline: square, strip, rectangle, full, or warp for any other."""
    visible = mask[0] < 0.5
    if not visible.any():
        return "full"

    def fills_its_box(where: Tensor) -> tuple[bool, int]:
        y, x = where.nonzero().T
        height, width = int(y.max() - y.min()) + 1, int(x.max() - x.min()) + 1
        return height * width == len(y), height

    box, height = fills_its_box(visible)
    if box:
        return "strip" if height == mask.shape[-2] else "square"
    return "rectangle" if fills_its_box(~visible)[0] else "warp"


def _pictures(row: Row, size: int, read: Callable) -> tuple[Tensor, Tensor, Tensor | None]:
    """Completion and masked picture (3, size, size), and the hole (1, size, size) where a mask was named."""
    image, masked = read_image(row.image, size), read(row.masked, size)
    files = [p for p in (row.image, row.masked, row.mask) if p is not None]
    sizes = {picture_size(p) for p in files}
    if len(sizes) > 1:
        listed = ", ".join(f"{w}×{h}" for h, w in sorted(sizes))
        raise ValueError(f"picture, masked picture and mask differ in size: {listed}")
    if row.mask is None:
        return image, masked, None
    hole = read_mask(row.mask, sizes.pop(), size)
    visible = (hole < 0.5).expand_as(image)
    if visible.any() and float((image - masked)[visible].abs().mean()) > STRANGE:
        raise ValueError(f"{row.image.name} differs from {row.masked.name} where nothing was to be painted")
    return image, masked, hole


def _prompt_numbers(rows: list[Row], pictures: list[Tensor], masks: list[Tensor]) -> Tensor:
    """One number a prompt, (N,). The same masked picture under two prompt ids is one prompt: ids that a data set gives
    carelessly must not carry a picture from one split into another."""
    parent: list[int] = []  # of each row; a row that is its own parent stands for its prompt
    first: dict[object, int] = {}  # the row that first had this id, or this masked picture

    def prompt_of(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, (row, masked, mask) in enumerate(zip(rows, pictures, masks)):
        parent.append(i)
        keys: tuple[object, ...] = (row.prompt_id,)
        if mask.min() < 0.5:  # where all is hole, all masked pictures are alike
            keys += (hashlib.sha256(masked.numpy().tobytes()).digest(),)
        for k in keys:
            a, b = prompt_of(first.setdefault(k, i)), prompt_of(i)
            parent[max(a, b)] = min(a, b)
    return torch.tensor([prompt_of(i) for i in range(len(rows))]).unique(return_inverse=True)[1]


def load(
    paths: str | Path | list[Path], size: int, low: float = LOWEST, high: float = HIGHEST, truth: Truth | None = None
) -> tuple[Ratings, list[str]]:
    """The ratings of a folder, or of several as in `scan`, and a line for each left out. ValueError if none is left.

    Pictures become (3, size, size). A hole that touches any part of a pixel makes it hole. `truth` turns the scene that
    a row names into what the prompts carry as truth; without it, nothing is known of any scene.
    """
    rows, problems = scan(paths, low, high)
    read_once = functools.cache(read_image)
    read: list[tuple[Row, Tensor, Tensor, Tensor | None]] = []
    unions: dict[Path, Tensor] = {}  # where no mask is named: what any completion changed
    for row in rows:
        try:
            image, grey, hole = _pictures(row, size, read_once)
        except (ValueError, OSError) as e:
            problems.append(f"{row.where}: {e}")
            continue
        if hole is None:
            changed = ((grey - image).abs().amax(0, keepdim=True) > 0.05).float()
            unions[row.masked] = torch.maximum(unions.get(row.masked, changed), changed)
        read.append((row, image, grey, hole))
    checked: dict[tuple, Any] = {}
    usable: list[Row] = []
    images, masked, masks, truths = list[Tensor](), list[Tensor](), list[Tensor](), list[Any]()
    for row, image, grey, named in read:
        hole = unions[row.masked] if named is None else named
        try:
            if not hole.any():
                raise ValueError(f"{row.masked} shows no hole")
            place = row.scene, row.masked, row.mask  # completions of one prompt share them
            if place not in checked:
                checked[place] = truth(row.scene, grey, hole) if truth and row.scene else None
            truths.append(checked[place])
        except ValueError as e:
            problems.append(f"{row.where}: {e}")
            continue
        usable.append(row)
        images.append(image)
        masked.append(grey)
        masks.append(hole)
    if not usable:
        first = f"; the first of {len(problems)} problems: {problems[0]}" if problems else ""
        folders = ",".join(map(str, _folders(paths)))
        raise ValueError(f"{folders}: no usable rating{first}")
    raters = torch.full((len(usable), max(len(r.labels) for r in usable)), math.nan, dtype=torch.float64)
    for line, row in zip(raters, usable):
        line[: len(row.labels)] = torch.tensor(row.labels, dtype=torch.float64)
    prompts = Prompts(
        torch.stack(masked),
        torch.stack(masks),
        [""] * len(usable),
        [r.kind or mask_kind(m) for r, m in zip(usable, masks)],
        None if None in truths else truths,
    )
    widened = torch.tensor([r.origin == "widened" for r in usable])
    groups = _prompt_numbers(usable, list(prompts.masked), masks)
    return Ratings(prompts, torch.stack(images), raters, groups, [r.source for r in usable], widened), problems
