"""Collecting ratings in the toy world: a policy completes prompts, simulated raters score them, files keep it all."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .data import rating_files
from .data.annotator import rate
from .data.prompts import Prompts, scene_prompts
from .data.scenes import REWARD_WORLD, world
from .models.unet import UNet
from .pipeline import Pipeline, Sampling

WIDENED = 2  # of each prompt's completions
RATED = Sampling(steps=6)  # as RL samples


def widen(images: Tensor, prompts: Prompts, generator: torch.Generator) -> Tensor:
    """Completions, half of the time original pictures, moved towards the truth, noise, blur or other colours, so
    that the raters see the whole range. (B, 3, H, W) -> the same.

    What the reward model never saw spoilt, RL will spoil: without the shifted colours it learned to over-brighten.
    """
    strength, kind = (torch.rand(len(images), 1, 1, 1, generator=generator) for _ in range(2))
    images = torch.where(kind < 0.5, images, prompts.images)
    noisy = images + 0.5 * strength * torch.randn(images.shape, generator=generator)
    smooth = torch.lerp(images, torch.nn.functional.avg_pool2d(images, 5, 1, 2, count_include_pad=False), strength)
    contrast, shift = (torch.randn(len(images), 3, 1, 1, generator=generator) for _ in range(2))
    tinted = (images - 0.5) * (1 + 0.5 * strength * contrast) + 0.5 + 0.25 * strength * shift
    kinds = torch.stack([torch.lerp(images, prompts.images, strength), noisy.clamp(0, 1), smooth, tinted.clamp(0, 1)])
    chosen = kinds[torch.randint(len(kinds), (len(images),), generator=generator), torch.arange(len(images))]
    return prompts.paste_known(chosen)


def collect(
    folder: str | Path,
    pipe: Pipeline,
    unet: UNet,
    *,
    seed: int,
    start: int,
    prompts: int,
    samples: int = 3,
    how: Sampling = RATED,
    widened: bool = True,
    source: str = "toy",
) -> Path:
    """Completes toy prompts number `start` … `samples` times each, widens two of each prompt, has all rated and
    written to `folder` (data/rating_files.py). The raters are three; their noise is part of `seed`."""
    prompts_world = world(REWARD_WORLD, seed)
    generator = torch.Generator().manual_seed(prompts_world + start)
    asked = scene_prompts(prompts_world, start, prompts)
    several = asked.repeat_each(samples)
    images = pipe.complete(unet, several, how, seed=seed, epoch=0, first=start * samples)
    which = list(range(len(several)))
    extra = min(WIDENED, samples) if widened else 0
    if extra:
        twice = [i * samples + k for i in range(prompts) for k in range(extra)]
        images = torch.cat([images, widen(images[twice], asked.repeat_each(extra), generator)])
        which += twice
    every = several.select(which)
    assert every.scenes is not None
    scores = rate(images, every.masks, every.scenes, generator)
    number = [start + i // samples for i in which]
    return rating_files.write(
        folder,
        every,
        images,
        scores,
        [f"{source}-{seed}-{n:06d}" for n in number],
        widened=torch.arange(len(images)) >= len(several),
        source=source,
        places=[(prompts_world, n) for n in number],
    )
