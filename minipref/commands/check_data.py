"""`python -m minipref check-data PATH`: what a folder holds, counts, ranges, and what is wrong where.

Knows folders of pictures and folders of ratings (data/rating_files.py). Ends with code 1 where something is wrong.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data import rating_files
from ..data.pictures import read_folder
from ..data.ratings import HIGHEST, LOWEST, lonely, split_for_fit
from ..presets import SMALL_SIZE
from ..runtime.config import one_line, opt, parse, printable, several
from ..toy.world import shown_scene

MARKS = ("ratings.jsonl", "ratings*/ratings.jsonl", "inpaint")  # what a folder of ratings holds
SHOWN = 20  # problems that are listed


@dataclass(frozen=True)
class CheckConfig:
    path: str = opt("", "folder of pictures or of ratings, or a ratings file (the flag's name may be left out)")
    score_lo: float = opt(LOWEST, "lowest score of the raters", lo=-1e9)
    score_hi: float = opt(HIGHEST, "highest score of the raters", lo=-1e9)


def counted(names: list[str]) -> str:
    return ", ".join(f"{n or 'unnamed'} {c}" for n, c in sorted(Counter(names).items()))


def check_ratings(path: str, low: float, high: float) -> tuple[list[str], list[str]]:
    """Lines about a folder of ratings, and its problems."""
    r, problems = rating_files.load(path, SMALL_SIZE, low, high, truth=shown_scene)
    labels, sizes = r.labels, r.groups.unique(return_counts=True)[1]
    lines = [
        f"{path}: ratings",
        f"{len(r)} rated pictures of {len(sizes)} prompts, {int(sizes.min())} to {int(sizes.max())} a prompt",
        f"labels {float(labels.min()):.2f} to {float(labels.max()):.2f}, mean {float(labels.mean()):.2f}, "
        f"standard deviation {float(labels.std()):.2f}",
        f"mask kinds: {counted(r.prompts.kinds)}; sources: {counted(r.sources)}",
        f"hole: {100 * float(r.prompts.masks.mean((1, 2, 3)).min()):.0f} to "
        f"{100 * float(r.prompts.masks.mean((1, 2, 3)).max()):.0f} % of the picture",
    ]
    several = int(((~r.raters.isnan()).sum(1) > 1).sum())
    if several:
        lines.append(
            f"{several} pictures have several raters, who differ with standard deviation {r.noise_scale():.2f}"
        )
    else:
        lines.append("one rater a picture: how noisy raters are cannot be told, the residuals must serve")
    if alone := lonely(r.groups):
        lines.append(f"{alone} prompts have a single rated picture: nothing says which completion of them is better")
    try:
        split = split_for_fit(r, 0, 1)
        lines.append(f"the last layer would be solved for on {len(split['ridge'])} of them: --dim must be smaller")
    except ValueError as e:
        problems.append(f"{path}: {e}")
    return lines, problems


def check_pictures(path: Path) -> tuple[list[str], list[str]]:
    """Lines about a folder of pictures, and its problems."""
    images, files, skipped = read_folder(path, SMALL_SIZE)
    flat = [str(f) for f, x in zip(files, images) if float(x.flatten(1).std(1).max()) < 1e-3]
    kinds, folders = counted([f.suffix.lower() for f in files]), len({f.parent for f in files})
    lines = [
        f"{path}: pictures",
        f"{len(files)} readable ({kinds}) in {folders} folders",
        f"mean brightness {float(images.mean()):.2f}, seen at {SMALL_SIZE}×{SMALL_SIZE} pixels",
    ]
    twins = Counter(hash(x.numpy().tobytes()) for x in images)
    if repeated := sum(n - 1 for n in twins.values()):
        lines.append(f"{repeated} pictures are copies of others")
    return lines, skipped + [f"{f}: a single flat colour" for f in flat]


def holds_ratings(path: Path) -> bool:
    is_file, many = path.suffix in (".json", ".jsonl"), len(several(str(path))) > 1
    return is_file or many or any(any(path.glob(x)) for x in MARKS)


def main(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-"):
        argv = ["--path", *argv]
    cfg = parse(CheckConfig, argv, prog="python -m minipref check-data", description=__doc__ or "")
    if not cfg.path:
        raise ValueError("check-data: name a folder of pictures or of ratings")
    torch.set_num_threads(1)
    path = Path(cfg.path)
    ratings = holds_ratings(path)
    lines, problems = check_ratings(cfg.path, cfg.score_lo, cfg.score_hi) if ratings else check_pictures(path)
    print("\n".join(map(printable, lines)))
    if problems:
        problems = [one_line(line) for line in problems]
        print(f"{len(problems)} problems:")
        print("\n".join(problems[:SHOWN] + ([f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])))
        sys.exit(1)
    print("nothing is wrong")
