"""Simulated raters who know the true scene, and the noise-free *gold* rating that they stray from.

A rater looks at three things, each in [0, 1]:
    structure   visible shapes are completed as the true scene has them; the rest of the hole is mostly background,
                a little better where it shows what truly was there
    texture     flat areas in the world's colours, not washed out, hatched, noisy or smeared
    seam        no edge along the hole's border that the true scene does not have
and gives three scores from 1 to 7 (PrefPaint, data set): structure, texture, overall; label = 0.15·s + 0.15·t + 0.7·o.
A fill that differs from the truth where nothing visible determines it loses little.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import rating_files
from ..data.prompts import Prompts, prompt_seed
from ..data.ratings import HIGHEST, LOWEST, WEIGHTS, Ratings, normalise
from .world import RGB, Scene, draw, layout, scene_prompts

if TYPE_CHECKING:
    from ..models.unet import UNet
    from ..pipeline import Pipeline, Sampling
    from ..reward_model import LearnedReward

WIDENED = 2  # of each prompt's completions
COLOUR_TOLERANCE = 0.35  # RGB distance at which two colours agree by 1/e
UNSEEN = 0.04  # RGB distance from the palette that nobody notices
SPOILT = 0.18  # … and at which a pixel counts as spoilt altogether
AT_ONCE = 512  # pictures that are judged together: bounds the memory, changes no rating
BACKGROUND_SHARE = 0.55  # of the undetermined hole; true scenes have more


@dataclass(frozen=True)
class Rating:
    """Scores (B,) from 1 to 7."""

    structure: Tensor
    texture: Tensor
    overall: Tensor

    @property
    def label(self) -> Tensor:
        return sum(w * getattr(self, k) for k, w in WEIGHTS.items())  # type: ignore[return-value]


def _agreement(a: Tensor, b: Tensor) -> Tensor:
    """How alike two colours are, per pixel: (B, 3, H, W) twice -> (B, H, W) in [0, 1]."""
    return torch.exp(-(((a - b) / COLOUR_TOLERANCE) ** 2).sum(1))


def _mean_over(values: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of values (B, H, W) over weights `where`, and the weights' sum; 0 where there is nothing to average."""
    total = where.flatten(1).sum(1)
    return (values * where).flatten(1).sum(1) / total.clamp(min=1e-6), total


def _determined(hole: Tensor, things: Tensor) -> Tensor:
    """Pixels of the hole that the visible part tells: a thing that is cut by the hole, and a rim of one pixel around.

    hole (B, H, W) bool, things (B, H, W) int64 -> (B, H, W) in [0, 1]: less where less than half of a thing is seen.
    """
    determined = torch.zeros_like(hole, dtype=torch.float32)
    for i in range(1, int(things.max()) + 1):
        body = things == i
        area, seen = body.flatten(1).sum(1), (body & ~hole).flatten(1).sum(1)
        seen_share = (2 * seen / area.clamp(min=1)).clamp(max=1)[:, None, None]
        rim = F.max_pool2d(body.float()[:, None], 3, stride=1, padding=1)[:, 0]
        determined = torch.maximum(determined, rim * seen_share)
    return determined * hole


def _structure(images: Tensor, truth: Tensor, hole: Tensor, things: Tensor, like_background: Tensor) -> Tensor:
    determined = _determined(hole, things)
    completed, weight = _mean_over(_agreement(images, truth), determined)
    share, _ = _mean_over(like_background, hole * (1 - determined))
    coherent = (share / BACKGROUND_SHARE).clamp(max=1)
    matter = (weight / 20).clamp(max=1) * 0.6  # twenty determined pixels count in full
    exact, _ = _mean_over(_agreement(images, truth), hole.float())
    return 0.9 * (matter * completed + (1 - matter) * coherent) + 0.1 * exact


def _cleanness(images: Tensor) -> Tensor:
    """How near each pixel is to one of the world's colours: (B, 3, H, W) -> (B, H, W) in [0, 1]."""
    palette = torch.from_numpy(RGB).to(images)  # (8, 3)
    nearest = torch.cdist(images.flatten(2).transpose(1, 2), palette).min(2).values.unflatten(1, images.shape[-2:])
    return 1 - ((nearest - UNSEEN) / (SPOILT - UNSEEN)).clamp(0, 1)


def _texture(
    images: Tensor, truth: Tensor, hole: Tensor, like_background: Tensor, like_true_background: Tensor
) -> Tensor:
    # Edges are never palette-clean, so the true scene sets the measure: 95 % of it is perfect, 40 % worthless.
    share = _mean_over(_cleanness(images), hole.float())[0] / _mean_over(_cleanness(truth), hole.float())[0].clamp(
        min=1e-6
    )
    overall = ((share - 0.40) / 0.55).clamp(0, 1)
    # A smeared thing is small beside its background, but it is what people look at: whatever stands out from the
    # background counts once more by itself. Of a small, crisply drawn thing about half is edge.
    crisp, measure = _crispness(images, hole, like_background), _crispness(truth, hole, like_true_background)
    crisp = (crisp + 1e-6) / (measure.clamp(max=0.5) + 1e-6)
    return overall * (0.4 + 0.6 * crisp.clamp(max=1))


def _crispness(images: Tensor, hole: Tensor, like_background: Tensor) -> Tensor:
    """Cleanness of what stands out from the background in the hole, (B,); 1 where there is next to nothing."""
    crisp, size = _mean_over(_cleanness(images), hole * (1 - like_background))
    return torch.where(size < 6, 1.0, crisp)


def _seam(images: Tensor, truth: Tensor, hole: Tensor) -> Tensor:
    excess, pairs = torch.zeros(len(images)), torch.zeros(len(images))
    for axis in (1, 2):
        size = hole.shape[axis] - 1
        border = hole.narrow(axis, 0, size) ^ hole.narrow(axis, 1, size)
        step, true_step = ((x.diff(dim=axis + 1)).norm(dim=1) for x in (images, truth))
        excess = excess + ((step - true_step - UNSEEN).clamp(min=0) * border).flatten(1).sum(1)
        pairs = pairs + border.flatten(1).sum(1)
    return torch.exp(-(excess / pairs.clamp(min=1)) / 0.25)


def gold(images: Tensor, masks: Tensor, batch: list[Scene]) -> Rating:
    """The noise-free rating. images (B, 3, H, W) in [0, 1] with known pixels in place, masks (B, 1, H, W), B scenes."""
    if not len(images) == len(masks) == len(batch):
        raise ValueError(f"gold: {len(images)} images, {len(masks)} masks, {len(batch)} scenes")
    if len(images) > AT_ONCE:
        parts = [
            gold(images[i : i + AT_ONCE], masks[i : i + AT_ONCE], batch[i : i + AT_ONCE])
            for i in range(0, len(images), AT_ONCE)
        ]
        return Rating(*(torch.cat([getattr(p, k) for p in parts]) for k in ("structure", "texture", "overall")))
    truth, hole = draw(batch), masks[:, 0].cpu() > 0.5
    images = images.detach().float().cpu()
    things = layout(batch)
    background = torch.stack([truth[i][:, things[i] == 0].median(1).values for i in range(len(batch))])  # (B, 3)
    like_background, like_true = (_agreement(x, background[:, :, None, None]) for x in (images, truth))
    structure = _structure(images, truth, hole, things, like_background)
    texture, seam = _texture(images, truth, hole, like_background, like_true), _seam(images, truth, hole)
    overall = (structure * texture * seam.sqrt()) ** 0.4  # one bad part spoils the whole
    return Rating(*(LOWEST + (HIGHEST - LOWEST) * x for x in (structure, texture, overall)))


def rate(
    images: Tensor,
    masks: Tensor,
    batch: list[Scene],
    generator: torch.Generator,
    *,
    raters: int = 3,
    noise: float = 0.4,
) -> list[Rating]:
    """What `raters` people say: the gold scores plus noise of that standard deviation, rounded to whole scores 1–7."""
    true = gold(images, masks, batch)

    def say(score: Tensor) -> Tensor:
        heard = score + noise * torch.randn(score.shape, generator=generator)
        return heard.round().clamp(LOWEST, HIGHEST)

    return [Rating(say(true.structure), say(true.texture), say(true.overall)) for _ in range(raters)]


def gold_scores(images: Tensor, prompts: Prompts) -> Tensor | None:
    """The gold label (B,) of completions of toy prompts; None where nobody knows it: pictures of your own."""
    return None if prompts.truth is None else gold(images, prompts.masks, prompts.truth).label


def gold_reward(images: Tensor, prompts: Prompts) -> Tensor:
    """The gold label as a reward, 1 to 7: an upper bound, never available with real people."""
    if prompts.truth is None:
        raise ValueError("gold needs the true scenes of the toy world; pictures of your own have none")
    return gold(images, prompts.masks, prompts.truth).label


def gold_labels(ratings: Ratings) -> Tensor | None:
    """The gold label (N,) of rated pictures: to judge a reward model by, never to train it."""
    return gold_scores(ratings.images, ratings.prompts)


# ------------------------------------------------------------------------------------------------ collecting ratings


def widen(images: Tensor, prompts: Prompts, generator: torch.Generator) -> Tensor:
    """Completions, half of the time original pictures, moved towards the truth, noise, blur or other colours, so
    that the raters see the whole range. (B, 3, H, W) -> the same.

    What the reward model never saw spoilt, RL will spoil: without the shifted colours it learned to over-brighten.
    """
    strength, kind = (torch.rand(len(images), 1, 1, 1, generator=generator) for _ in range(2))
    images = torch.where(kind < 0.5, images, prompts.images)
    noisy = images + 0.5 * strength * torch.randn(images.shape, generator=generator)
    smooth = torch.lerp(images, F.avg_pool2d(images, 5, 1, 2, count_include_pad=False), strength)
    contrast, shift = (torch.randn(len(images), 3, 1, 1, generator=generator) for _ in range(2))
    tinted = (images - 0.5) * (1 + 0.5 * strength * contrast) + 0.5 + 0.25 * strength * shift
    kinds = torch.stack([torch.lerp(images, prompts.images, strength), noisy.clamp(0, 1), smooth, tinted.clamp(0, 1)])
    chosen = kinds[torch.randint(len(kinds), (len(images),), generator=generator), torch.arange(len(images))]
    return prompts.paste_known(chosen)


def rate_completions(
    folder: str | Path,
    prompts: Prompts,
    images: Tensor,
    *,
    seed: int,
    start: int,
    widened: bool = True,
    source: str = "toy",
) -> Path:
    """Has completions rated by three raters and writes all to `folder` (data/rating_files.py).

    prompts: the "rating" prompts of `seed`, number `start` and on; images: each one's completions side by side, as many
    of each, (P·S, 3, H, W). Two of each prompt are widened and rated, too. The raters' noise is part of seed and start.
    """
    world, samples = prompt_seed("rating", seed), len(images) // len(prompts)
    if len(images) != samples * len(prompts):
        raise ValueError(f"{len(images)} completions of {len(prompts)} prompts: expected as many of each")
    generator = torch.Generator().manual_seed(world + start * 1_000_003)  # seeds are below a million: no two meet
    completed, extra = len(images), min(WIDENED, samples) if widened else 0
    index = list(range(completed))
    if extra:
        first = [i * samples + k for i in range(len(prompts)) for k in range(extra)]
        images = torch.cat([images, widen(images[first], prompts.repeat_each(extra), generator)])
        index += first
    every = prompts.repeat_each(samples).select(index)
    assert every.truth is not None
    ratings = rate(images, every.masks, every.truth, generator)
    numbers = [start + i // samples for i in index]
    return rating_files.write(
        folder,
        every,
        images,
        [vars(r) for r in ratings],
        [f"{source}-{seed}-{n:06d}" for n in numbers],
        widened=torch.arange(len(images)) >= completed,
        source=source,
        scenes=[(world, n) for n in numbers],
    )


def trust_of_policies(
    unets: dict[str, UNet], pipe: Pipeline, model: LearnedReward, sampling: Sampling, seed: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """On completions of held-out toy prompts by the base model and by each of `unets` (run folder -> policy): gamma of
    each (N,), and over all of them norms and errors against gold: does the norm tell where the reward is wrong?"""
    prompts = scene_prompts(prompt_seed("held out", seed), 0, 128, pipe.image_size)
    short = ["base", *(Path(k).name for k in unets)]  # a name of its own for each, the whole path where need be
    policies = {"base": pipe.unet} | {n if short.count(n) == 1 else k: unets[k] for n, k in zip(short[1:], unets)}
    gammas, norms, errors = dict[str, Tensor](), [], []
    for name, unet in policies.items():
        images = pipe.complete(unet, prompts, sampling, seed=seed, stream="policies")
        scores, label = model(images, prompts), gold_reward(images, prompts).double()
        y = normalise(label, [f"toy/{k}" for k in prompts.kinds], model.calibration.label_norms)
        gammas[name] = scores.trust if scores.trust is not None else torch.ones(len(images))
        norms.append(scores.parts["norm"])
        errors.append((scores.value - y).abs())
    return gammas, torch.cat(norms), torch.cat(errors)
