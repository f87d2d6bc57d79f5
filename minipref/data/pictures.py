"""Your own pictures: a folder of any depth with PNG, JPEG or WebP files."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
OTHERS = {".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl"}  # named, not read


def read_image(path: str | Path, size: int | None, ground: str = "white") -> Tensor:
    """One picture: turned upright, transparency on `ground`, centre square, resized. -> (3, size, size) in [0, 1].

    size None keeps height and width. Raises FileNotFoundError, or ValueError with the file and the reason.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                picture = ImageOps.exif_transpose(opened)
                if picture.mode in ("I;16", "I"):  # 16-bit grey: Pillow's convert would cut it off at 255
                    grey = np.asarray(picture, dtype=np.float32) / 65535
                    picture = Image.fromarray((grey * 255).round().astype(np.uint8))
                rgba = picture.convert("RGBA")
    except Exception as e:  # Pillow raises a dozen kinds for broken files
        raise ValueError(f"{path}: not a readable picture ({type(e).__name__}: {e})") from None
    picture = Image.alpha_composite(Image.new("RGBA", rgba.size, ground), rgba).convert("RGB")
    if size is not None:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def read_mask(path: str | Path, like: tuple[int, int], size: int) -> Tensor:
    """A mask picture, white = hole, of the same height and width as its picture. -> (1, size, size), 0 or 1.

    What is transparent is no hole.
    """
    mask = read_image(path, None, ground="black").mean(0, keepdim=True)
    if tuple(mask.shape[-2:]) != tuple(like):
        (h, w), (H, W) = mask.shape[-2:], like
        raise ValueError(f"{path}: the mask is {w}×{h} pixels but the picture {W}×{H}; they must be equally large")
    hole = (mask > 0.5).float()
    if not hole.any():
        raise ValueError(f"{path}: the mask has no white pixel, so there is no hole to fill")
    side = min(like)
    top, left = (like[0] - side) // 2, (like[1] - side) // 2
    square = hole[:, top : top + side, left : left + side]
    if not square.any():
        raise ValueError(f"{path}: the hole lies outside the centre square of {side} pixels that is kept")
    # A pixel that is hole in any part is hole: nothing shows that was to be replaced.
    return (torch.nn.functional.interpolate(square[None], size=(size, size), mode="area")[0] > 0).float()


def split_pictures(images: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures to train on, and every fifth held out; of fewer than ten all serve for both, under other masks."""
    if len(images) < 10:
        return images, images
    fifth = torch.arange(len(images)) % 5 == 4
    return images[~fifth], images[fifth]


def read_folder(folder: str | Path, size: int) -> tuple[Tensor, list[Path], list[str]]:
    """All pictures below a folder, by name. -> (N, 3, size, size), their files, and a line for each file skipped."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of pictures")
    images, files, skipped = [], [], []
    suffixes = SUFFIXES | OTHERS
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and not p.is_dir()):
        if path.suffix.lower() in OTHERS:
            skipped.append(f"{path}: is not read; convert it to one of {', '.join(sorted(SUFFIXES))}")
            continue
        try:
            images.append(read_image(path, size))
            files.append(path)
        except (ValueError, OSError) as e:
            skipped.append(str(e))
    if not images:
        reason = f"; skipped {len(skipped)}, the first: {skipped[0]}" if skipped else ""
        raise ValueError(f"{folder}: holds no readable picture ({', '.join(sorted(SUFFIXES))}){reason}")
    return torch.stack(images), files, skipped
