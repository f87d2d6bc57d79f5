"""Rated completions in memory: their splits by prompt and the scale of their labels. `rating_files.py` reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .prompts import Prompts

WEIGHTS = {"structure": 0.15, "texture": 0.15, "overall": 0.7}  # of a label: 0.15·s + 0.15·t + 0.7·o (PrefPaint)
LOWEST, HIGHEST = 1, 7  # scores of PrefPaint's raters
LEAST = 20  # ratings that a (source, mask kind) needs for a mean and a spread of its own
SPLITS = {"features": 0.6, "ridge": 0.25, "judge": 0.15}  # of the prompts, never of the pictures


@dataclass(frozen=True)
class Ratings:
    """N rated pictures. `prompts` holds each one's own prompt, repeated; its pictures show grey in the hole."""

    prompts: Prompts
    images: Tensor  # (N, 3, H, W)
    raters: Tensor  # (N, R) each rater's label, NaN where fewer have rated
    groups: Tensor  # (N,), the prompt's number
    sources: list[str] = field(default_factory=list)
    widened: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Tensor:
        """The raters' mean, (N,) float32."""
        return self.raters.nanmean(1).float()

    @property
    def strata(self) -> list[str]:
        """Source and mask kind of each picture: what labels are normalised by (PrefPaint, data set)."""
        return [f"{s}/{k}" for s, k in zip(self.sources, self.prompts.kinds)]

    def select(self, chosen: Tensor) -> Ratings:
        """The pictures where `chosen` (N,) is true."""
        at = chosen.nonzero()[:, 0]
        return Ratings(
            self.prompts.select(at),
            self.images[at],
            self.raters[at],
            self.groups[at],
            [self.sources[i] for i in at.tolist()],
            self.widened[at],
        )

    def noise_scale(self) -> float:
        """Standard deviation of one rater's label around the mean of the raters, from repeated ratings; else NaN."""
        count = (~self.raters.isnan()).sum(1)
        several = count > 1
        if not several.any():
            return math.nan
        squares = (self.raters - self.raters.nanmean(1, keepdim=True)).square().nansum(1)
        return float((squares[several].sum() / (count[several] - 1).sum()).sqrt())


# ------------------------------------------------------------------------------------------------ what to do with them


def split_by_prompt(groups: Tensor, seed: int, shares: dict[str, float] = SPLITS) -> dict[str, Tensor]:
    """Which pictures belong to which split, (N,) bool each; all pictures of a prompt go together.

    Raises ValueError where a split would be empty.
    """
    names = groups.unique()
    order = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
    split, at = {}, 0
    for i, (name, share) in enumerate(shares.items()):
        stop = len(order) if i == len(shares) - 1 else at + round(share * len(order))
        if stop == at:
            raise ValueError(f"{len(order)} prompts are too few to split: none is left for {name!r}; rate more prompts")
        split[name] = torch.isin(groups, order[at:stop])
        at = stop
    return split


def label_norms(r: Ratings) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of the labels of each (source, mask kind); "" holds those of all together, which
    serve for strata of fewer than LEAST ratings or without spread."""
    labels = r.labels.double()
    if len(labels) < 2 or not float(labels.std()) > 0:
        raise ValueError(f"all {len(labels)} ratings are {float(labels[0]):g}: nothing to learn")
    norms = {"": (float(labels.mean()), float(labels.std()))}
    for s in sorted(set(r.strata)):
        own = labels[torch.tensor([s == x for x in r.strata])]
        if len(own) >= LEAST and float(own.std()) > 0:
            norms[s] = float(own.mean()), float(own.std())
    return norms


def normalise(labels: Tensor, strata: list[str], norms: dict[str, tuple[float, float]]) -> Tensor:
    """(label − mean)/standard deviation of its stratum; of all ratings where the stratum is unknown. (N,)."""
    mean, spread = (torch.tensor([norms.get(s, norms[""])[i] for s in strata]) for i in (0, 1))
    return (labels - mean) / spread


def denormalise(values: Tensor, strata: list[str], norms: dict[str, tuple[float, float]]) -> Tensor:
    """The inverse of `normalise`: back on the raters' scale."""
    mean, spread = (torch.tensor([norms.get(s, norms[""])[i] for s in strata]) for i in (0, 1))
    return values * spread + mean


def lonely(groups: Tensor) -> int:
    """How many prompts have a single rated picture: they say nothing about which completion of a prompt is better."""
    return int((groups.unique(return_counts=True)[1] == 1).sum())


def split_for_fit(r: Ratings, seed: int, dim: int, pairs: bool = False) -> dict[str, Ratings]:
    """By prompt, so that no picture is judged by what another one of its prompt taught; the third split keeps only
    pictures as a policy makes them, none that were widened. Refuses what cannot be learned from with `dim` features."""
    split = {k: r.select(v) for k, v in split_by_prompt(r.groups, seed).items()}
    split["judge"] = split["judge"].select(~split["judge"].widened)
    if not len(split["judge"]):
        raise ValueError("every rating of the third split is of a widened picture: none is left to judge the model by")
    if len(split["ridge"]) <= dim:
        raise ValueError(
            f"the second split holds {len(split['ridge'])} ratings for --dim {dim}: rate more or lower --dim"
        )
    label_norms(split["features"])
    if pairs and lonely(split["features"].groups) == len(split["features"].groups.unique()):
        raise ValueError("no prompt of the first split has two rated pictures: there are no pairs to learn from")
    return split
