"""Your own pictures: a folder of any depth with PNG, JPEG or WebP files. The one reader of picture files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP")  # by content: a name says nothing about what a file makes a reader do
SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp"}
OTHERS = {".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl"}  # named, not read
MOST_PIXELS = 178_956_970  # of one picture: Pillow's own limit, about half a gigabyte
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """A picture file, opened. Raises FileNotFoundError, or ValueError with the file and the reason."""
    path = Path(path)
    if not path.is_file():  # nor a pipe, which would wait for ever
        raise FileNotFoundError(f"{path}: no such picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise ValueError(f"{picture.width}×{picture.height} pixels, more than {MOST_PIXELS:,}")
                yield picture
    except Exception as e:  # Pillow raises a dozen kinds for broken files
        raise ValueError(f"{path}: not a readable picture, PNG, JPEG or WebP ({type(e).__name__}: {e})") from None


def picture_size(path: str | Path) -> tuple[int, int]:
    """Height and width of a picture, upright."""
    with open_picture(path) as picture:
        turned = False
        with contextlib.suppress(Exception):  # broken EXIF turns nothing
            turned = picture.getexif().get(0x0112) in TURNED
        return (picture.width, picture.height) if turned else (picture.height, picture.width)


def _upright(path: str | Path) -> Image.Image:
    """The whole picture as RGBA, turned as its camera says."""
    with open_picture(path) as opened:
        try:
            picture = ImageOps.exif_transpose(opened)
        except Exception:  # broken EXIF turns nothing; a broken picture fails again below
            picture = opened
        if picture.mode in ("I;16", "I"):  # 16-bit grey: Pillow's convert would cut it off at 255
            grey = np.asarray(picture, dtype=np.float32)
            scale = 257 if grey.max() > 1 else 1  # of a mask of zeros and ones the ones stay
            picture = Image.fromarray((grey / scale).round().astype(np.uint8))
        return picture.convert("RGBA")


def read_image(path: str | Path, size: int | None) -> Tensor:
    """One picture: turned upright, transparency on white, centre square, resized. -> (3, size, size) in [0, 1].

    size None keeps height and width. Raises FileNotFoundError, or ValueError with the file and the reason.
    """
    rgba = _upright(path)
    picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if size is not None:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def read_mask(path: str | Path, like: tuple[int, int], size: int) -> Tensor:
    """A mask picture, white = hole, of the same height and width as its picture. -> (1, size, size), 0 or 1.

    A mask of zeros and ones, as arrays are saved, counts as black and white. One with transparent parts is refused:
    some programs cut the hole out, others paint it on nothing.
    """
    rgba = _upright(path)
    if (rgba.height, rgba.width) != tuple(like):
        (h, w), (H, W) = (rgba.height, rgba.width), like
        raise ValueError(f"{path}: the mask is {w}×{h} pixels but the picture {W}×{H}; they must be equally large")
    pixels = np.asarray(rgba)
    if pixels[..., 3].min() < 255:
        raise ValueError(f"{path}: the mask has transparent parts; save it in black and white alone, white = hole")
    grey = torch.from_numpy(pixels[..., :3].astype(np.float32)).mean(2)[None]
    hole = (grey > (0 if grey.max() == 1 else 127.5)).float()
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


def walk(folder: Path) -> list[Path]:
    """All files below a folder, by name; what links lead to counts once, hidden files and folders are left out."""
    files, seen = [], {os.path.realpath(folder)}

    def new(path: str) -> bool:
        size, real = len(seen), os.path.realpath(path)
        seen.add(real)
        return len(seen) > size

    for here, folders, names in os.walk(folder, followlinks=True):
        visible, shown = (sorted(n for n in every if not n.startswith(".")) for every in (folders, names))
        folders[:] = [n for n in visible if new(os.path.join(here, n))]
        files += [Path(here) / n for n in shown if new(os.path.join(here, n))]
    return sorted(files)


def picture_list(folder: str | Path) -> str:
    """A digest of which pictures lie below a folder: their names there, and their sizes in bytes."""
    files = [p for p in walk(Path(folder)) if p.suffix.lower() in SUFFIXES and p.is_file()]
    rows = [f"{p.relative_to(folder).as_posix()} {p.stat().st_size}\n" for p in files]
    return hashlib.sha256("".join(sorted(rows)).encode(errors="surrogateescape")).hexdigest()[:16]


def read_folder(folder: str | Path, size: int) -> tuple[Tensor, list[Path], list[str]]:
    """All pictures below a folder, by name. -> (N, 3, size, size), their files, and a line for each file skipped."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of pictures")
    images, files, skipped = [], [], []
    for path in (p for p in walk(folder) if p.suffix.lower() in SUFFIXES | OTHERS):
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
