"""What an inpainting model is asked to complete: pictures with holes, as one batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import masks as M
from .scenes import SIZE, Scene, draw, scenes


@dataclass(frozen=True)
class Prompts:
    """B prompts. This is the `batch` that a reward receives.

    images (B, 3, H, W) in [0, 1]: the originals;  masks (B, 1, H, W): 1 in the hole;
    texts: B captions, "" where there is none;  kinds: B names of mask kinds;
    scenes: the B true scenes of the toy world, None for pictures of your own.
    """

    images: Tensor
    masks: Tensor
    texts: list[str]
    kinds: list[str]
    scenes: list[Scene] | None = None

    def __post_init__(self):
        B = len(self.images)
        lengths = [len(self.masks), len(self.texts), len(self.kinds)] + ([len(self.scenes)] if self.scenes else [])
        if any(n != B for n in lengths) or self.masks.shape != (B, 1, *self.images.shape[-2:]):
            raise ValueError(
                f"Prompts: images {tuple(self.images.shape)}, masks {tuple(self.masks.shape)}, lists {lengths}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def masked(self) -> Tensor:
        """The pictures with their holes in grey, (B, 3, H, W)."""
        return M.mask_image(self.images, self.masks)

    def select(self, index) -> Prompts:
        """The prompts at `index` (a slice, or integers), in that order."""
        at = list(range(len(self)))[index] if isinstance(index, slice) else [int(i) for i in index]
        return Prompts(
            self.images[at],
            self.masks[at],
            [self.texts[i] for i in at],
            [self.kinds[i] for i in at],
            [self.scenes[i] for i in at] if self.scenes else None,
        )

    def repeat_each(self, times: int) -> Prompts:
        """Each prompt `times` times in a row."""
        return self.select([i for i in range(len(self)) for _ in range(times)])

    def paste_known(self, generated: Tensor) -> Tensor:
        """Completions with the known pixels put back bit for bit, (B, 3, H, W)."""
        return M.paste_known(generated, self.images, self.masks)


def _outpainting(rng: np.random.Generator, count: int, size: int) -> tuple[Tensor, list[str]]:
    return M.random_masks(rng, count, size, {k: 1.0 for k in M.OUTPAINTING})


def scene_prompts(seed: int, start: int, count: int) -> Prompts:
    """Toy prompts number `start` … of the world `seed`, with PrefPaint's outpainting masks and empty texts."""
    drawn = [_outpainting(np.random.default_rng([seed, i, 1]), 1, SIZE) for i in range(start, start + count)]
    batch = scenes(seed, start, count)
    masks, kinds = torch.cat([m for m, _ in drawn]), [k[0] for _, k in drawn]
    return Prompts(draw(batch), masks, [""] * count, kinds, batch)


def text_prompts(texts: list[str]) -> Prompts:
    """Texts alone: everything is hole, as text-to-image."""
    n = len(texts)
    return Prompts(torch.full((n, 3, SIZE, SIZE), 0.5), torch.ones(n, 1, SIZE, SIZE), texts, ["full"] * n)


def picture_prompts(images: Tensor, seed: int, start: int, count: int) -> Prompts:
    """Your pictures (N, 3, S, S), in turn, each time with another outpainting mask."""
    index = [i % len(images) for i in range(start, start + count)]
    drawn = [
        _outpainting(np.random.default_rng([seed, i, 1]), 1, images.shape[-1]) for i in range(start, start + count)
    ]
    masks, kinds = torch.cat([m for m, _ in drawn]), [k[0] for _, k in drawn]
    return Prompts(images[index], masks, [""] * count, kinds)
