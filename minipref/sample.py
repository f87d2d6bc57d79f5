"""`python -m minipref sample --run RUN`: completions of the base beside those of the aligned model, as one PNG.

Your own picture: `--image photo.jpg --mask hole.png` (white = hole; without one, an outpainting mask is drawn).
A prompt alone, `--prompt "a red circle on a blue background" --full`, is text-to-image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .data import masks as M
from .data.folders import SUFFIXES, read_image, read_mask
from .data.prompts import Prompts, text_prompts
from .data.scenes import SIZE
from .evaluate import load_run, run_prompts
from .pipeline import Pipeline, Sampling
from .runtime.config import opt, parse
from .runtime.draw import grid, save, to_image


@dataclass(frozen=True)
class SampleConfig:
    run: str = opt("", "run folder of train_rl.py; empty: the base model alone")
    weights: str = opt("", "without --run: folder with unet.pt and clip.pt; empty: the shipped small ones")
    checkpoint: str = opt(
        "", "last, best, or empty: the weights that the run was judged by", choices=("", "last", "best")
    )
    image: str = opt("", "a picture to complete; empty: held-out prompts of the run")
    mask: str = opt("", "its mask: equally large, white = hole")
    prompt: str = opt("", "text condition; inpainting works without")
    full: bool = opt(False, "everything is hole: text-to-image")
    count: int = opt(8, "completions", lo=1)
    steps: int = opt(0, "DDIM steps; 0: those of the run, or 25", lo=0)
    eta: float = opt(1.0, "noise of the DDIM steps, 0 is deterministic", lo=0, hi=1)
    guidance: float = opt(1.0, "classifier-free guidance scale", lo=0)
    seed: int = opt(0, "seed of the noise and of drawn masks", lo=0)
    out: str = opt("", "PNG to write; empty: sample.png in the run folder or here")
    device: str = opt("cpu", "cpu, cuda or mps")
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0)


def wanted(cfg: SampleConfig, config: dict) -> Prompts:
    """The prompts that the command line asks for, `count` of them."""
    rng = np.random.default_rng(cfg.seed)
    if cfg.mask and not cfg.image:
        raise ValueError("--mask needs the --image that it belongs to")
    if cfg.full and cfg.mask:
        raise ValueError("--full and --mask exclude each other")
    if cfg.image:
        picture = read_image(cfg.image, SIZE)
        if cfg.mask:
            H, W = read_image(cfg.image, None).shape[-2:]
            mask = read_mask(cfg.mask, (H, W), SIZE)
            masks = mask[None].expand(cfg.count, -1, -1, -1).contiguous()
        else:
            masks, _ = M.random_masks(
                rng, cfg.count, SIZE, {"full": 1.0} if cfg.full else {"square": 0.5, "strip": 0.5}
            )
        return Prompts(picture[None].repeat(cfg.count, 1, 1, 1), masks, [cfg.prompt] * cfg.count, ["own"] * cfg.count)
    if cfg.full:
        return text_prompts([cfg.prompt] * cfg.count)
    found = run_prompts(config, 0, cfg.count)
    return Prompts(found.images, found.masks, [cfg.prompt] * cfg.count, found.kinds, found.scenes)


def main(argv: list[str] | None = None) -> None:
    cfg = parse(SampleConfig, argv, prog="minipref sample", description=__doc__ or "")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    out = Path(cfg.out or Path(cfg.run) / "sample.png")
    if out.suffix.lower() not in SUFFIXES or out.is_dir():
        raise ValueError(f"--out {out}: name a picture file, such as sample.png")
    for given in (cfg.image, cfg.mask):
        if given and out.resolve() == Path(given).resolve():
            raise ValueError(f"--out {out}: is the picture to be read; name another file")
    if cfg.run and cfg.weights:
        raise ValueError("--weights: a run knows the weights that it started from")
    if cfg.run:
        config, pipe, aligned = load_run(cfg.run, cfg.checkpoint, cfg.device)
    else:
        config, pipe, aligned = {}, Pipeline.load(cfg.weights, cfg.device), None
    if unknown := pipe.tokenizer.unknown(cfg.prompt):
        print(f"note: the model has never seen: {', '.join(unknown)}")
    prompts = wanted(cfg, config)
    how = Sampling(cfg.steps or config.get("steps", 25), cfg.eta, cfg.guidance)
    models = [("base", pipe.unet)] + ([("aligned", aligned)] if aligned is not None else [])
    made = {name: pipe.complete(unet, prompts, how, seed=cfg.seed, epoch=0) for name, unet in models}
    rows = [] if cfg.full else [("prompt (grey = hole)", prompts.masked)]
    save(grid(rows + list(made.items()), cell=96, title=cfg.prompt), out)
    for name, images in made.items():  # at their own size, for further use
        for i, x in enumerate(images):
            save(to_image(x), out.with_suffix("") / f"{name}_{i:02d}.png")
    print(f"written: {out}, and each completion in {out.with_suffix('')}/")
