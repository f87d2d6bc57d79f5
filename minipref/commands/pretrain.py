"""`python -m minipref pretrain`: weights from nothing: CLIP, then the UNet.

The base model learns from pictures of mixed quality, as web-scale data are: about half of its partial holes are filled
carelessly. Pre-training learns what exists; alignment then chooses what people like.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import masks as M
from ..data.prompts import prompt_seed
from ..diffusion import Schedule, add_noise, target
from ..losses import denoising_loss
from ..models.clip import CLIP, clip_loss
from ..models.tokenizer import WordTokenizer
from ..models.unet import UNet
from ..pipeline import check_text, load_clip, load_unet, pick_device, text_digest
from ..presets import SMALL_CODEC, SMALL_SCHEDULE, SMALL_SIZE, SMALL_UNET, small_clip
from ..runs import RENAMED
from ..runtime import checkpoint
from ..runtime.config import PICTURES, opt, parse
from ..runtime.runlog import progress, read_json
from ..toy import world as S


@dataclass(frozen=True)
class PretrainConfig:
    preset: str = opt("", "named set of values; flags override it")
    out: str = opt("", "folder for unet.pt and clip.pt; empty: runs/pretrain-small")
    seed: int = opt(0, "seed of weights, scenes and noise", lo=0, hi=999_999)
    only: str = opt(
        "all",
        "which part to train; later parts read the earlier ones from --out",
        choices=("all", "clip", "unet"),
    )
    clip_steps: int = opt(6000, "updates of the CLIP-like encoders", lo=1)
    clip_batch: int = opt(192, "pictures a contrastive batch", lo=2, hi=PICTURES)
    clip_lr: float = opt(1e-3, "peak learning rate of the encoders", lo=0)
    unet_steps: int = opt(60000, "updates of the UNet", lo=1)
    unet_batch: int = opt(32, "pictures a batch of the UNet", lo=1, hi=PICTURES)
    unet_lr: float = opt(2e-3, "peak learning rate of the UNet", lo=0)
    start_from: str = opt(
        "", "folder whose clip.pt or unet.pt (--only says which) is trained on, with new scenes; empty: from nothing"
    )
    ema: float = opt(0.999, "decay of the averaged weights that are kept", lo=0, hi=1)
    sloppy_share: float = opt(0.5, "share of the partial holes that are filled carelessly", lo=0, hi=1)
    full_share: float = opt(0.6, "share of full masks, that is of plain text-to-image", lo=0, hi=1)
    noisy_share: float = opt(0.7, "share of times drawn from the noisier 65 % of the schedule alone", lo=0, hi=1)
    device: str = opt("cpu", "where to train: cpu, cuda or mps")
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0, hi=1024)


PRESETS: dict[str, dict] = {"small": {}}


def warmup_cosine(step: int, total: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(1, total - warmup))))


# ------------------------------------------------------------------------------------------------ CLIP


CLIP_PLAIN_SHARE = 0.2  # patterns are what the encoders learn last: they come more often than in the world


TWIN_WEIGHT = 0.5  # of the contrast between two pictures of one thing, beside that of pictures and captions


def elsewhere(rng: np.random.Generator, scene: S.Scene) -> S.Scene:
    """Another scene whose first thing is this one's: shape, colours and pattern; place, size and the rest are new."""
    thing, other = scene.things[0], scene
    while other is scene or other.background in (thing.colour, thing.second):
        other = S.random_scene(rng, S.COLOURS, S.SECOND_OBJECT_SHARE, CLIP_PLAIN_SHARE)
    attributes = {k: getattr(thing, k) for k in ("shape", "colour", "pattern", "second")}
    return replace(other, things=(replace(other.things[0], **attributes), *other.things[1:]))


def clip_batch(rng: np.random.Generator, count: int, hard_share: float = 0.5) -> tuple[Tensor, list[str], Tensor]:
    """Whole pictures, half of them sloppy, captions that name the quality half of the time, and each picture's twin.

    A twin shows the first thing again, elsewhere and as sloppy or clean: an encoder that has to find it does not
    look at background and neighbours alone. `hard_share` of the batches hold three colours only: there colour tells
    little apart, and shape and pattern must. Otherwise neither tower learns much of shapes.
    """
    few = tuple(rng.permutation(S.COLOURS)[:3].tolist()) if rng.random() < hard_share else S.COLOURS
    batch = [S.random_scene(rng, few, S.SECOND_OBJECT_SHARE, CLIP_PLAIN_SHARE) for _ in range(count)]
    careless = torch.from_numpy(rng.random(count) < 0.5)
    images, twins = S.draw(batch), S.draw([elsewhere(rng, s) for s in batch])
    images, twins = (torch.where(careless[:, None, None, None], S.sloppy(x), x) for x in (images, twins))
    quality = ["sloppy" if c else "clean" for c in careless.tolist()]
    return images, [S.caption(s, rng, q if rng.random() < 0.5 else None) for s, q in zip(batch, quality)], twins


def clip_recall(clip: CLIP, tokenizer, seed: int, count: int = 256) -> float:
    """Share of `count` held-out pictures whose own caption is the nearest of all (recall@1)."""
    images, texts, _ = clip_batch(np.random.default_rng([prompt_seed("held out", seed), 1]), count, hard_share=0.0)
    with torch.no_grad():
        similarity = clip.encode_image(images) @ clip.encode_text(tokenizer(texts)).T
    return float((similarity.argmax(1) == torch.arange(count)).float().mean())


def train_clip(cfg: PretrainConfig, out: Path, command: str) -> dict:
    """From nothing, or on from earlier weights; then the text that the UNet reads stays as it is."""
    torch.manual_seed(cfg.seed)
    tokenizer, stages, held = WordTokenizer(S.WORDS), list[dict](), set[str]()
    clip = CLIP(small_clip(tokenizer))
    for name, p in clip.named_parameters():  # transformers' scale of embeddings; torch's default 1 is far too large
        if "embedding" in name:
            torch.nn.init.normal_(p, std=0.02)
    if cfg.start_from:
        earlier, tokenizer = load_clip(Path(cfg.start_from) / "clip.pt")
        if earlier.config != clip.config or tokenizer.words != S.WORDS:
            raise ValueError(f"{cfg.start_from}/clip.pt: is configured differently from the small preset")
        clip.load_state_dict(earlier.state_dict())
        held = {f"text_model.{name}" for name in clip.context_state()}
        stages = checkpoint.load(Path(cfg.start_from) / "clip.pt", "clip")[2].get("stages", [])
    clip.to(cfg.device).train()
    for name, p in clip.named_parameters():
        p.requires_grad_(name not in held)
    trained = [p for p in clip.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=cfg.clip_lr, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    rng = np.random.default_rng(prompt_seed("clip", cfg.seed))
    start, bar = time.time(), progress(range(cfg.clip_steps), "CLIP")
    for step in bar:
        optimiser.param_groups[0]["lr"] = cfg.clip_lr * warmup_cosine(step, cfg.clip_steps)
        images, texts, twins = clip_batch(rng, cfg.clip_batch)
        image, twin = clip.encode_image(torch.cat([images, twins]).to(cfg.device)).chunk(2)
        text = clip.encode_text(tokenizer(texts).to(cfg.device))
        loss = clip_loss(image, text, clip.logit_scale) + TWIN_WEIGHT * clip_loss(image, twin, clip.logit_scale)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        clip.logit_scale.data.clamp_(max=float(np.log(100)))
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    clip.cpu().eval()
    recall = clip_recall(clip, tokenizer, 0)
    now = {"command": command, "seed": cfg.seed, "steps": cfg.clip_steps, "recall_at_1_of_256": recall}
    stages = [*stages, now | {"seconds": time.time() - start}]
    figures = {"recall_at_1_of_256": recall, "stages": stages, "seconds": sum(s["seconds"] for s in stages)}
    meta = {"words": list(tokenizer.words), "stages": stages}
    checkpoint.save(out / "clip.pt", "clip", clip.config, clip.state_dict(), dtype=torch.float16, meta=meta)
    return figures


# ------------------------------------------------------------------------------------------------ UNet


def mask_shares(full_share: float) -> dict[str, float]:
    rest = {"square": 0.3, "strip": 0.3, "rectangle": 0.25, "warp": 0.15}
    return {k: v * (1 - full_share) for k, v in rest.items()} | {"full": full_share}


# Scenes of full masks: what is hard to draw from a text alone, two things and patterns, comes more often.
TEXT_TWO_SHARE, TEXT_PLAIN_SHARE = 0.55, 0.3


def unet_batch(rng: np.random.Generator, cfg: PretrainConfig) -> tuple[Tensor, Tensor, list[str]]:
    """Targets (B, 3, H, W), masks (B, 1, H, W), captions.

    Targets are clean outside the hole and, for `sloppy_share` of the partial holes, sloppy inside; nothing that is
    visible or said reveals which. Were the visible part sloppy too, all completions of one prompt would be alike,
    and differences *within* a prompt are all that RL can use. Full masks stay clean. Half of the partial holes go
    without a caption: inpainting prompts are empty, as PrefPaint's are.
    """
    n = cfg.unet_batch
    masks, kinds = M.random_masks(rng, n, SMALL_SIZE, mask_shares(cfg.full_share))
    full = np.array([k == "full" for k in kinds])
    of_text, of_world = (TEXT_TWO_SHARE, TEXT_PLAIN_SHARE), (S.SECOND_OBJECT_SHARE, S.PLAIN_SHARE)
    batch = [S.random_scene(rng, S.COLOURS, *(of_text if f else of_world)) for f in full]
    images = S.draw(batch)
    careless = torch.from_numpy((rng.random(n) < cfg.sloppy_share) & ~full)[:, None, None, None]
    images = torch.where(careless, M.paste_known(S.sloppy(images), images, masks), images)
    silent = rng.random(n) < np.where(full, 0.1, 0.5)
    return images, masks, ["" if quiet else S.caption(s, rng) for s, quiet in zip(batch, silent)]


def training_times(count: int, length: int, noisy_share: float, generator: torch.Generator) -> Tensor:
    """Times (count,) in [0, length): uniform, but for `noisy_share` of them uniform over the last 65 %.

    Shapes are decided where noise prevails; at small times the loss asks for the noise itself, which no eye sees.
    """
    u, noisy = torch.rand(count, generator=generator), torch.rand(count, generator=generator) < noisy_share
    return (torch.where(noisy, 0.35 + 0.65 * u, u) * length).long().clamp(max=length - 1)


UNFINISHED = "unet-unfinished.pt"
UNET_SETTINGS = ("seed", "unet_lr", "unet_batch", "ema", "sloppy_share", "full_share", "noisy_share")  # kept with it


def train_unet(cfg: PretrainConfig, out: Path, command: str) -> dict:
    clip, tokenizer = load_clip(out / "clip.pt")
    clip.to(cfg.device)
    torch.manual_seed(cfg.seed)
    schedule, codec = Schedule(SMALL_SCHEDULE), SMALL_CODEC
    unet, stages = UNet(SMALL_UNET), list[dict]()
    if cfg.start_from:
        start_from = Path(cfg.start_from) / "unet.pt"
        if not start_from.exists() and (start_from.parent / UNFINISHED).exists():
            start_from = start_from.parent / UNFINISHED
        earlier, its_schedule, meta = load_unet(start_from)
        if earlier.config != SMALL_UNET:
            raise ValueError(f"{start_from}: is configured differently from the small preset ({SMALL_UNET})")
        if its_schedule.config != SMALL_SCHEDULE:
            raise ValueError(f"{start_from}: was trained with another noise schedule than the small preset's")
        check_text(meta, clip, out / "clip.pt", start_from)
        if "stages" not in meta:
            raise ValueError(f"{start_from}: does not say how it was trained; name the folder of a pretrain run")
        checkpoint.fill(unet, earlier.state_dict(), start_from)
        stages = list(meta["stages"])
    unet = unet.to(memory_format=torch.channels_last).to(cfg.device).train()  # type: ignore[call-overload]
    average = {k: v.detach().clone() for k, v in unet.state_dict().items()}
    optimiser = torch.optim.AdamW(unet.parameters(), lr=cfg.unet_lr, weight_decay=0.01, fused=True)
    rng = np.random.default_rng([prompt_seed("train", cfg.seed), len(stages)])
    noise_generator = torch.Generator().manual_seed(prompt_seed("train", cfg.seed) + len(stages) * 1_000_000_007)
    start, recent, bar = time.time(), 0.0, progress(range(cfg.unet_steps), "UNet")

    settings = {k: v for k, v in asdict(cfg).items() if k in UNET_SETTINGS}

    def keep(name: str) -> list[dict]:
        now = {"command": command, "steps": step + 1, "loss": recent, "seconds": time.time() - start, **settings}
        done = [*stages, now]
        meta = {"stages": done, "schedule": asdict(SMALL_SCHEDULE), "clip": text_digest(clip)}
        checkpoint.save(out / name, "unet", unet.config, average, dtype=torch.float16, meta=meta)
        return done

    for step in bar:
        optimiser.param_groups[0]["lr"] = cfg.unet_lr * warmup_cosine(step, cfg.unet_steps)
        images, masks, texts = unet_batch(rng, cfg)
        x_0 = codec.encode(images)
        noise = torch.randn(x_0.shape, generator=noise_generator)
        t = training_times(len(x_0), len(schedule), cfg.noisy_share, noise_generator)
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
            keep(UNFINISHED)  # usable at any time
    done = keep("unet.pt")
    (out / UNFINISHED).unlink(missing_ok=True)
    # The loss is an average over the last few hundred updates, at the times that `noisy_share` prefers.
    return {"loss": recent, "stages": done, "seconds": sum(s["seconds"] for s in done)}


def main(argv: list[str] | None = None) -> None:
    cfg = parse(
        PretrainConfig,
        argv,
        prog="python -m minipref pretrain",
        description=__doc__ or "",
        presets=PRESETS,
        renamed=RENAMED["pretrain"],
    )
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    pick_device(cfg.device)
    out = Path(cfg.out or f"runs/pretrain-{cfg.preset}")
    if cfg.start_from and cfg.only not in ("clip", "unet"):
        raise ValueError("--start-from needs --only clip or --only unet (which reads the clip.pt in --out)")
    if cfg.start_from and os.path.realpath(out) == os.path.realpath(cfg.start_from):
        raise ValueError("--out and --start-from are the same folder: the earlier weights would be lost")
    for part in ("clip", "unet"):
        if cfg.only in ("all", part) and (out / f"{part}.pt").exists():
            raise ValueError(f"--out {out}: holds a {part}.pt already; name another folder, or move it away")
    if cfg.only != "clip" and (out / UNFINISHED).exists():
        raise ValueError(
            f"--out {out}: holds the {UNFINISHED} of a training that was stopped; name another folder, and train on "
            f"from it by --only unet --start-from {out} (with a copy of its clip.pt), or move it away"
        )
    checkpoint.check_folder(out, f"--out {out}")
    if cfg.only == "unet":  # what cannot be trained is refused before anything is written
        load_clip(out / "clip.pt")
    if cfg.start_from:
        names = ["clip.pt"] if cfg.only == "clip" else ["unet.pt", UNFINISHED]
        if not any((Path(cfg.start_from) / name).is_file() for name in names):
            raise FileNotFoundError(f"--start-from {cfg.start_from}: {cfg.start_from}/{names[0]} is missing")
    out.mkdir(parents=True, exist_ok=True)
    figures, command = read_json(out / "pretrain.json"), shlex.join(sys.argv[1:] if argv is None else argv)
    for part, train in (("clip", train_clip), ("unet", train_unet)):
        if cfg.only in ("all", part):
            figures[part] = {"command": f"python -m minipref pretrain {command}"}
            figures[part] |= train(cfg, out, figures[part]["command"])
            checkpoint.write_text(out / "pretrain.json", json.dumps(figures, indent=1) + "\n")
            print(part, json.dumps(figures[part]))
    if (out / "unet.pt").exists():
        weights, rewarded = (shlex.quote(str(p)) for p in (out, out.with_name(f"{out.name}-reward")))
        print(
            f"no reward model belongs to these weights yet: python train_reward.py --small --weights {weights} --out "
            f"{rewarded}; then python train_rl.py --small --weights {weights} --reward model:{rewarded}"
        )
