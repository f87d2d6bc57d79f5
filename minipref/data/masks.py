"""Holes for inpainting: PrefPaint's two outpainting masks and its warping holes, rectangles, and everything.

Each function returns a mask (H, W), float32, 1 in the hole and 0 where the picture is known.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Rng = np.random.Generator


def visible_square(rng: Rng, size: int) -> np.ndarray:
    """Outpainting: all but a square of 15–25 % of the picture's area is hole (PrefPaint, data set).

    The paper's "15–25 % of the image size" is read as area: as a length it would leave 5 of 32 pixels.
    """
    side = round(size * float(np.sqrt(rng.uniform(0.15, 0.25))))
    y, x = rng.integers(0, size - side + 1, 2)
    mask = np.ones((size, size), np.float32)
    mask[y : y + side, x : x + side] = 0
    return mask


def visible_strip(rng: Rng, size: int) -> np.ndarray:
    """Outpainting: all but a full-height strip, 35–40 % of the width, is hole (PrefPaint, data set)."""
    width = round(size * rng.uniform(0.35, 0.40))
    x = rng.integers(0, size - width + 1)
    mask = np.ones((size, size), np.float32)
    mask[:, x : x + width] = 0
    return mask


def rectangle(rng: Rng, size: int) -> np.ndarray:
    """One rectangular hole, sides 30–75 % of the picture's."""
    h, w = np.round(size * rng.uniform(0.30, 0.75, 2)).astype(int)
    y, x = rng.integers(0, size - h + 1), rng.integers(0, size - w + 1)
    mask = np.zeros((size, size), np.float32)
    mask[y : y + h, x : x + w] = 1
    return mask


def full(rng: Rng, size: int) -> np.ndarray:
    """Nothing is known: text-to-image."""
    return np.ones((size, size), np.float32)


def warp(rng: Rng, size: int) -> np.ndarray:
    """What a moved camera uncovers: one of the 3×3 views of yaw ±0.3, pitch ±0.15 rad but the frontal one.

    The picture is laid on a random smooth relief, the camera turns about its centre, and pixels that no
    surface point reaches are the hole. (PrefPaint estimates the depth of real photos; only the *shape* of the
    hole is used here, on the unmoved picture, so that the truth behind it stays known.)
    """
    view = [(yaw, pitch) for yaw in (-0.3, 0, 0.3) for pitch in (-0.15, 0, 0.15) if yaw or pitch]
    yaw, pitch = view[rng.integers(len(view))]
    fine, distance = 3 * size, 2.0  # picture spans [-1, 1]²; the camera stands 2 away
    relief = torch.from_numpy(rng.normal(size=(1, 1, 4, 4)))
    z = 0.3 * F.interpolate(relief, size=(fine, fine), mode="bicubic", align_corners=True)[0, 0].numpy()
    axis = (np.arange(fine) + 0.5) / fine * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    x, y = x * (distance + z) / distance, y * (distance + z) / distance  # back-projected: unmoved view is exact
    x, z = x * np.cos(yaw) + z * np.sin(yaw), -x * np.sin(yaw) + z * np.cos(yaw)
    y, z = y * np.cos(pitch) + z * np.sin(pitch), -y * np.sin(pitch) + z * np.cos(pitch)
    u, v = (np.floor((c * distance / (distance + z) + 1) / 2 * size).astype(int) for c in (x, y))
    seen = (u >= 0) & (u < size) & (v >= 0) & (v < size)
    mask = np.ones((size, size), np.float32)
    mask[v[seen], u[seen]] = 0
    return mask


# Who draws which: OUTPAINTING below (prompts of RL and of ratings), pretrain's `mask_shares`, `sample`. On disk a kind
# may be left out; rating_files.mask_kind then guesses it from the outline.
KINDS: dict[str, Callable[[Rng, int], np.ndarray]] = {
    "square": visible_square,
    "strip": visible_strip,
    "warp": warp,
    "rectangle": rectangle,
    "full": full,
}
OUTPAINTING = ("square", "strip")  # PrefPaint's main data; half each


def random_masks(rng: Rng, count: int, size: int, shares: dict[str, float]) -> tuple[Tensor, list[str]]:
    """`count` masks, kinds drawn with probabilities `shares`. Returns (count, 1, size, size) and their kinds."""
    unknown = set(shares) - set(KINDS)
    if unknown:
        raise ValueError(f"unknown mask kind {sorted(unknown)}; choose from {', '.join(KINDS)}")
    p = np.array(list(shares.values()), dtype=float)
    kinds = [str(k) for k in rng.choice(list(shares), size=count, p=p / p.sum())]
    return torch.from_numpy(np.stack([KINDS[k](rng, size) for k in kinds]))[:, None], kinds


def mask_image(images: Tensor, masks: Tensor) -> Tensor:
    """The picture with its hole in middle grey (0 inside the codec, as Stable Diffusion inpainting has it)."""
    return torch.where(masks > 0.5, torch.full_like(images, 0.5), images)


def paste_known(generated: Tensor, images: Tensor, masks: Tensor) -> Tensor:
    """Known pixels, bit for bit, around what was generated in the hole."""
    return torch.where(masks > 0.5, generated, images)
