"""What a model is asked to complete: pictures with holes, or texts alone, as one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import masks as M
from .pictures import read_folder, split_pictures

# What prompts are drawn for; each purpose has seeds of its own, so that no prompt serves for two.
PURPOSES = ("train", "clip", "rating", "rl", "held out")


def prompt_seed(purpose: str, seed: int = 0) -> int:
    """The seed of all prompts of one purpose; `seed` (below a million, so that none meet) chooses among its worlds."""
    if not 0 <= seed < 1_000_000:
        raise ValueError(f"seed {seed}: choose 0 to 999999")
    return (1 + PURPOSES.index(purpose)) * 1_000_003 + seed


@dataclass(frozen=True)
class Prompts:
    """B prompts, as a reward receives them.

    images (B, 3, H, W) in [0, 1]: the originals, or None where there are texts alone;
    masks (B, 1, H, W): 1 in the hole, None with them;
    texts: B captions, "" where there is none;  kinds: B names of mask kinds;
    truth: what is truly there, for those who made the prompts (the toy world), None for pictures of your own.
    """

    images: Tensor
    masks: Tensor
    texts: list[str]
    kinds: list[str]
    truth: list[Any] | None = None

    def __post_init__(self):
        B = len(self.texts)
        lengths = [len(self.kinds)] + ([len(self.truth)] if self.truth else [])
        shapes = [None if x is None else tuple(x.shape) for x in (self.images, self.masks)]
        fits = shapes == [None, None] or None not in shapes and shapes[1] == (B, 1, *self.images.shape[-2:])
        if any(n != B for n in lengths) or not fits or (shapes[0] and shapes[0][0] != B):
            raise ValueError(f"Prompts: images {shapes[0]}, masks {shapes[1]}, {B} texts, other lists {lengths}")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def masked(self) -> Tensor:
        """The pictures with their holes in grey, (B, 3, H, W); ValueError where there are texts alone."""
        if self.images is None:
            raise ValueError("these prompts are texts alone: there is no picture with a hole")
        return M.mask_image(self.images, self.masks)

    def select(self, index) -> Prompts:
        """The prompts at `index` (a slice, or integers), in that order."""
        at = list(range(len(self)))[index] if isinstance(index, slice) else [int(i) for i in index]
        return Prompts(
            self.images if self.images is None else self.images[at],
            self.masks if self.masks is None else self.masks[at],
            [self.texts[i] for i in at],
            [self.kinds[i] for i in at],
            [self.truth[i] for i in at] if self.truth else None,
        )

    def repeat_each(self, times: int) -> Prompts:
        """Each prompt `times` times in a row."""
        return self.select([i for i in range(len(self)) for _ in range(times)])

    def paste_known(self, generated: Tensor) -> Tensor:
        """Completions with the known pixels put back bit for bit, (B, 3, H, W)."""
        return generated if self.images is None else M.paste_known(generated, self.images, self.masks)


PromptSource = Callable[[int, int], Prompts]  # (start, count) -> prompts number start, start + 1 …


def outpainting_masks(seed: int, start: int, count: int, size: int) -> tuple[Tensor, list[str]]:
    """PrefPaint's two kinds of outpainting masks, half each: (count, 1, size, size), and their kinds. Each mask is a
    function of (seed, number) alone."""
    shares = {k: 1.0 for k in M.OUTPAINTING}
    drawn = [M.random_masks(np.random.default_rng([seed, i, 1]), 1, size, shares) for i in range(start, start + count)]
    return torch.cat([masks for masks, _ in drawn]), [kinds[0] for _, kinds in drawn]


def text_prompts(texts: list[str]) -> Prompts:
    """Texts alone: text-to-image. A network with inpainting channels gets a mask of all ones from the pipeline."""
    return Prompts(None, None, texts, ["full"] * len(texts))  # type: ignore[arg-type]


def picture_prompts(images: Tensor, seed: int, start: int, count: int) -> Prompts:
    """Your pictures (N, 3, S, S), in turn, each time with another outpainting mask."""
    masks, kinds = outpainting_masks(seed, start, count, images.shape[-1])
    index = [i % len(images) for i in range(start, start + count)]
    return Prompts(images[index], masks, [""] * count, kinds)


def picture_sources(folder: str, size: int, seed: int, held_out: int) -> tuple[PromptSource, PromptSource, list[str]]:
    """Prompts of your own pictures: to train on (numbered by `seed`), and held out; and lines about the folder."""
    images, _, skipped = read_folder(folder, size)
    train, held = split_pictures(images)
    lines = [f"skipped {line}" for line in skipped]
    lines.append(
        f"{len(images)} pictures from {folder} ({len(skipped)} skipped): {len(train)} train, {len(held)} held out"
    )
    if len(train) == len(images):
        lines.append(
            "fewer than ten pictures: the same serve for both, so that held-out figures say little about others"
        )
    train_seed, held_seed = prompt_seed("rl", seed), prompt_seed("held out", held_out)
    return (
        lambda start, count: picture_prompts(train, train_seed, start, count),
        lambda start, count: picture_prompts(held, held_seed, start, count),
        lines,
    )
