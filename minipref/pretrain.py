"""`python -m minipref pretrain`: the shipped weights from nothing: CLIP, then the UNet, then the reward model.

The base model learns from pictures of mixed quality, as web-scale data are: about half of its training pairs have a
carelessly filled hole. Pre-training learns what exists; alignment then chooses what people like.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import metrics
from .data import masks as M
from .data import scenes as S
from .data.annotator import gold, mean_label, rate
from .data.prompts import Prompts, scene_prompts
from .data.scenes import CLIP_WORLD, HELD_OUT_WORLD, REWARD_WORLD, TRAIN_WORLD, world
from .diffusion import Schedule, add_noise, target
from .losses import denoising_loss
from .models.clip import CLIP, clip_loss
from .models.unet import UNet
from .pipeline import Pipeline, Sampling, load_clip, pick_device
from .presets import SMALL_CODEC, SMALL_FEATURES, SMALL_SCHEDULE, SMALL_UNET, small_clip, small_tokenizer
from .report import gold_sheet
from .rewards import FeatureConfig, LearnedReward, RewardFeatures, ridge_fit, trust_from_quantiles
from .runtime import checkpoint
from .runtime.config import opt, parse
from .runtime.runlog import progress


@dataclass(frozen=True)
class PretrainConfig:
    out: str = opt("runs/pretrain-small", "folder for unet.pt, clip.pt and reward.pt")
    seed: int = opt(0, "seed of weights, scenes and noise", lo=0, hi=999_999)
    only: str = opt(
        "all",
        "which part to train; later parts read the earlier ones from --out",
        choices=("all", "clip", "unet", "reward"),
    )
    clip_steps: int = opt(2400, "updates of the CLIP-like encoders", lo=1)
    clip_batch: int = opt(192, "pictures a contrastive batch", lo=2)
    clip_lr: float = opt(1e-3, "peak learning rate of the encoders", lo=0)
    unet_steps: int = opt(20000, "updates of the UNet", lo=1)
    unet_batch: int = opt(32, "pictures a batch of the UNet", lo=1)
    unet_lr: float = opt(1.5e-3, "peak learning rate of the UNet", lo=0)
    ema: float = opt(0.999, "decay of the averaged weights that are kept", lo=0, hi=1)
    sloppy_share: float = opt(0.5, "share of the training holes that are filled carelessly", lo=0, hi=1)
    full_share: float = opt(0.4, "share of full masks, that is of plain text-to-image", lo=0, hi=1)
    reward_prompts: int = opt(1024, "prompts whose completions are rated for the reward model", lo=20)
    reward_samples: int = opt(3, "completions rated a prompt, beside two that are widened", lo=2)
    reward_steps: int = opt(6, "DDIM steps of a rated completion: those of RL", lo=2)
    reward_epochs: int = opt(40, "passes over the first split's ratings", lo=1)
    reward_lr: float = opt(2e-3, "peak learning rate of the reward features", lo=0)
    ridge_lam: float = opt(0.01, "lam, ridge penalty of the last layer (PrefPaint: 0.01)", lo=1e-9)
    device: str = opt("cpu", "where to train: cpu, cuda or mps")
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0)


PRESETS: dict[str, dict] = {"small": {}}


def warmup_cosine(step: int, total: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(1, total - warmup))))


# ------------------------------------------------------------------------------------------------ CLIP


def clip_batch(rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
    """Whole pictures, half of them sloppy, and captions that name the quality half of the time."""
    batch = [S.random_scene(rng) for _ in range(count)]
    images, careless = S.draw(batch), torch.from_numpy(rng.random(count) < 0.5)
    images = torch.where(careless[:, None, None, None], S.sloppy(images), images)
    quality = ["sloppy" if c else "clean" for c in careless.tolist()]
    return images, [S.caption(s, rng, q if rng.random() < 0.5 else None) for s, q in zip(batch, quality)]


def clip_recall(clip: CLIP, tokenizer, seed: int, count: int = 256) -> float:
    """Share of `count` held-out pictures whose own caption is the nearest of all (recall@1)."""
    images, texts = clip_batch(np.random.default_rng([world(HELD_OUT_WORLD, seed), 1]), count)
    with torch.no_grad():
        similarity = clip.encode_image(images) @ clip.encode_text(tokenizer(texts)).T
    return float((similarity.argmax(1) == torch.arange(count)).float().mean())


def train_clip(cfg: PretrainConfig, out: Path) -> dict:
    torch.manual_seed(cfg.seed)
    tokenizer, clip = small_tokenizer(), CLIP(small_clip())
    for name, p in clip.named_parameters():  # transformers' scale of embeddings; torch's default 1 is far too large
        if "embedding" in name:
            torch.nn.init.normal_(p, std=0.02)
    clip.to(cfg.device).train()
    optimiser = torch.optim.AdamW(clip.parameters(), lr=cfg.clip_lr, weight_decay=0.05, betas=(0.9, 0.98))
    rng = np.random.default_rng(world(CLIP_WORLD, cfg.seed))
    start, bar = time.time(), progress(range(cfg.clip_steps), "CLIP")
    for step in bar:
        optimiser.param_groups[0]["lr"] = cfg.clip_lr * warmup_cosine(step, cfg.clip_steps)
        images, texts = clip_batch(rng, cfg.clip_batch)
        image = clip.encode_image(images.to(cfg.device))
        text = clip.encode_text(tokenizer(texts).to(cfg.device))
        loss = clip_loss(image, text, clip.logit_scale)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimiser.step()
        clip.logit_scale.data.clamp_(max=float(np.log(100)))
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    clip.cpu().eval()
    figures = {"recall_at_1_of_256": clip_recall(clip, tokenizer, cfg.seed), "seconds": time.time() - start}
    meta = {"words": list(tokenizer.words), "seed": cfg.seed, "steps": cfg.clip_steps, **figures}
    checkpoint.save(out / "clip.pt", "clip", clip.config, clip.state_dict(), dtype=torch.float16, meta=meta)
    return figures


# ------------------------------------------------------------------------------------------------ UNet


def mask_shares(full_share: float) -> dict[str, float]:
    rest = {"square": 0.3, "strip": 0.3, "rectangle": 0.25, "warp": 0.15}
    return {k: v * (1 - full_share) for k, v in rest.items()} | {"full": full_share}


def unet_batch(rng: np.random.Generator, cfg: PretrainConfig) -> tuple[Tensor, Tensor, list[str]]:
    """Targets (B, 3, H, W), masks (B, 1, H, W), captions.

    Targets are clean outside the hole and, for `sloppy_share` of the partial holes, sloppy inside; nothing that is
    visible or said reveals which. Were the visible part sloppy too, all completions of one prompt would be alike,
    and differences *within* a prompt are all that RL can use. Full masks stay clean. Half of the partial holes go
    without a caption: inpainting prompts are empty, as PrefPaint's are.
    """
    n = cfg.unet_batch
    batch = [S.random_scene(rng) for _ in range(n)]
    images = S.draw(batch)
    masks, kinds = M.random_masks(rng, n, S.SIZE, mask_shares(cfg.full_share))
    full = np.array([k == "full" for k in kinds])
    careless = torch.from_numpy((rng.random(n) < cfg.sloppy_share) & ~full)[:, None, None, None]
    images = torch.where(careless, M.paste_known(S.sloppy(images), images, masks), images)
    silent = rng.random(n) < np.where(full, 0.1, 0.5)
    return images, masks, ["" if quiet else S.caption(s, rng) for s, quiet in zip(batch, silent)]


def train_unet(cfg: PretrainConfig, out: Path) -> dict:
    clip, tokenizer = load_clip(out / "clip.pt")
    clip.to(cfg.device)
    torch.manual_seed(cfg.seed)
    schedule, codec = Schedule(SMALL_SCHEDULE), SMALL_CODEC
    unet = UNet(SMALL_UNET).to(memory_format=torch.channels_last).to(cfg.device).train()  # type: ignore[call-overload]
    average = {k: v.detach().clone() for k, v in unet.state_dict().items()}
    optimiser = torch.optim.AdamW(unet.parameters(), lr=cfg.unet_lr, weight_decay=0.01, fused=True)
    rng = np.random.default_rng(world(TRAIN_WORLD, cfg.seed))
    noise_generator = torch.Generator().manual_seed(world(TRAIN_WORLD, cfg.seed))
    start, recent, bar = time.time(), 0.0, progress(range(cfg.unet_steps), "UNet")

    def keep():
        meta = {"seed": cfg.seed, "steps": step + 1, "loss": recent, "seconds": time.time() - start}
        meta |= {"schedule": asdict(SMALL_SCHEDULE)}
        checkpoint.save(out / "unet.pt", "unet", unet.config, average, dtype=torch.float16, meta=meta)

    for step in bar:
        optimiser.param_groups[0]["lr"] = cfg.unet_lr * warmup_cosine(step, cfg.unet_steps)
        images, masks, texts = unet_batch(rng, cfg)
        x_0 = codec.encode(images)
        noise = torch.randn(x_0.shape, generator=noise_generator)
        t = torch.randint(len(schedule), (len(x_0),), generator=noise_generator)
        x_t, goal = add_noise(schedule, x_0, noise, t), target(schedule, x_0, noise, t)
        x_in = torch.cat([x_t, codec.encode_mask(masks), codec.encode(M.mask_image(images, masks))], dim=1)
        with torch.no_grad():
            context = clip.context(tokenizer(texts).to(cfg.device))
        prediction = unet(x_in.to(cfg.device), t.to(cfg.device), context)
        loss = denoising_loss(prediction, goal.to(cfg.device)).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        decay = min(cfg.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [v.detach() for v in unet.state_dict().values()], 1 - decay)
        recent = loss.item() if step == 0 else 0.99 * recent + 0.01 * loss.item()
        if step % 100 == 99:
            bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
        if step % 1000 == 999 and step + 1 < cfg.unet_steps:
            keep()  # usable at any time
    keep()
    return {"loss": recent, "seconds": time.time() - start}


# ------------------------------------------------------------------------------------------------ the reward model

SPLITS = {"features": 0.6, "ridge": 0.25, "calibration": 0.15}  # of the prompts, never of the pictures


@dataclass(frozen=True)
class Ratings:
    """Rated completions: N pictures, each with its prompt (so repeated), label and prompt number."""

    prompts: Prompts
    images: Tensor  # (N, 3, H, W)
    labels: Tensor  # (N,), 1 to 7
    truth: Tensor  # (N,), gold: to judge the reward model by, never to train it
    groups: Tensor  # (N,), the prompt's number
    widened: Tensor  # (N,) bool: spoilt or mended by hand to widen the range


def widen(images: Tensor, prompts: Prompts, generator: torch.Generator) -> Tensor:
    """Completions, half of the time original pictures, moved towards the truth, noise, blur or other colours, so
    that the raters see the whole range.

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


def collect_ratings(pipe: Pipeline, seed: int, prompts: int, samples: int, steps: int) -> Ratings:
    """Completes `prompts` scenes `samples` times each, widens two of each prompt, and has all rated."""
    generator = torch.Generator().manual_seed(world(REWARD_WORLD, seed))
    asked = scene_prompts(world(REWARD_WORLD, seed), 0, prompts)
    several = asked.repeat_each(samples)
    chunks = [
        pipe.complete(pipe.unet, several.select(slice(i, i + 64)), Sampling(steps), seed=seed, epoch=0, first=i)
        for i in progress(range(0, len(several), 64), "completions")
    ]
    completions = torch.cat(chunks)
    twice = [i * samples + k for i in range(prompts) for k in range(2)]
    every = several.select([*range(len(several)), *twice])
    images = torch.cat([completions, widen(completions[twice], asked.repeat_each(2), generator)])
    assert every.scenes is not None
    labels = mean_label(rate(images, every.masks, every.scenes, generator))
    truth = gold(images, every.masks, every.scenes).label
    if not (torch.isfinite(labels).all() and torch.isfinite(images).all()):
        raise ValueError("a completion or its rating is not a finite number; the UNet's weights may be broken")
    groups = torch.cat([torch.arange(prompts).repeat_interleave(k) for k in (samples, 2)])
    return Ratings(every, images, labels, truth, groups, torch.arange(len(images)) >= len(several))


def split_by_prompt(groups: Tensor, seed: int) -> dict[str, Tensor]:
    """Which samples belong to which split, (N,) bool each; all samples of a prompt go together."""
    count = int(groups.max()) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    split, at = {}, 0
    for i, (name, share) in enumerate(SPLITS.items()):
        stop = count if i == len(SPLITS) - 1 else at + round(share * count)
        split[name] = torch.isin(groups, order[at:stop])
        at = stop
    return split


def fit_features(r: Ratings, y: Tensor, config: FeatureConfig, seed: int, epochs: int, lr: float) -> RewardFeatures:
    """Trains the tower by regression on normalised labels (PrefPaint Section 3). Its last layer is thrown away."""
    torch.manual_seed(seed)
    tower, last = RewardFeatures(config), torch.nn.Linear(config.dim, 1, bias=False)
    parameters = [*tower.parameters(), *last.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    masked, masks, batch = r.prompts.masked, r.prompts.masks, 128
    steps_an_epoch = -(-len(y) // batch)
    for epoch in progress(range(epochs), "reward features"):
        for k, at in enumerate(torch.randperm(len(y)).split(batch)):
            done = epoch * steps_an_epoch + k
            optimiser.param_groups[0]["lr"] = lr * warmup_cosine(done, epochs * steps_an_epoch, 50)
            turned = (lambda x: x.flip(-1)) if (epoch + k) % 2 else (lambda x: x)  # mirrored every other time
            z = tower(*(turned(x[at]) for x in (r.images, masked, masks)))
            loss = (last(z)[:, 0] - y[at]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return tower.eval()


def select(r: Ratings, chosen: Tensor) -> Ratings:
    at = chosen.nonzero()[:, 0]
    return Ratings(r.prompts.select(at), r.images[at], r.labels[at], r.truth[at], r.groups[at], r.widened[at])


def label_norms(r: Ratings) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of the labels of each mask kind (PrefPaint normalises per source and mask kind)."""
    kinds = {k: torch.tensor([x == k for x in r.prompts.kinds]) for k in sorted(set(r.prompts.kinds))}
    return {k: (float(r.labels[at].mean()), float(r.labels[at].std())) for k, at in kinds.items()}


def normalise(labels: Tensor, kinds: list[str], norms: dict[str, tuple[float, float]]) -> Tensor:
    """(label − mean)/standard deviation of its mask kind, (N,)."""
    mean, spread = (torch.tensor([norms[k][i] for k in kinds]) for i in (0, 1))
    return (labels - mean) / spread


def train_reward(cfg: PretrainConfig, out: Path) -> dict:
    """Features on one split, ridge and V on a second, figures on a third (PrefPaint Sections 3–4)."""
    start = time.time()
    r = collect_ratings(
        Pipeline.load(out, cfg.device), cfg.seed, cfg.reward_prompts, cfg.reward_samples, cfg.reward_steps
    )
    gold_sheet(out / "gold_sheet.png", r.images, r.truth)
    split = {k: select(r, v) for k, v in split_by_prompt(r.groups, cfg.seed).items()}
    norms_of = label_norms(split["features"])
    y = {k: normalise(v.labels, v.prompts.kinds, norms_of) for k, v in split.items()}
    tower = fit_features(split["features"], y["features"], SMALL_FEATURES, cfg.seed, cfg.reward_epochs, cfg.reward_lr)
    with torch.no_grad():
        z = {k: tower(v.images, v.prompts.masked, v.prompts.masks) for k, v in split.items()}
    ridge = ridge_fit(z["ridge"], y["ridge"], cfg.ridge_lam)
    norms = ridge.norm(z["ridge"])
    quantiles = {str(q): float(norms.quantile(q)) for q in (0.05, 0.5, 0.95, 0.99)}
    model = LearnedReward(tower, ridge, *trust_from_quantiles(norms), quantiles)

    # On completions of unseen prompts, against gold: what RL will rely on.
    own = ~split["calibration"].widened
    guess, truth = ridge(z["calibration"])[own], split["calibration"].truth[own]
    figures = {
        "spearman": metrics.spearman(guess, truth),
        "within_prompt_correlation": metrics.within_prompt_correlation(guess, truth, split["calibration"].groups[own]),
        "r2": metrics.r_squared(guess, normalise(truth, select(split["calibration"], own).prompts.kinds, norms_of)),
        "rated": len(r.labels),
        "label_norms": norms_of,
        "seconds": time.time() - start,
    }
    model.save(out / "reward.pt", {"seed": cfg.seed, **figures})
    return figures


def main(argv: list[str] | None = None) -> None:
    cfg = parse(PretrainConfig, argv, prog="minipref pretrain", description=__doc__ or "", presets=PRESETS)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    pick_device(cfg.device)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    figures = json.loads((out / "pretrain.json").read_text()) if (out / "pretrain.json").exists() else {}
    for part, train in (("clip", train_clip), ("unet", train_unet), ("reward", train_reward)):
        if cfg.only in ("all", part):
            figures[part] = {"command": f"python -m minipref pretrain --small --seed {cfg.seed} --only {part}"}
            figures[part] |= train(cfg, out)
            text = json.dumps(figures, indent=1) + "\n"
            checkpoint.atomic_write(out / "pretrain.json", lambda p, text=text: p.write_text(text))
            print(part, json.dumps(figures[part]))
