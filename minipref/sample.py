"""`python -m minipref sample --run RUN`: completions of the base beside those of the aligned model, as one PNG.

Your own picture: `--image photo.jpg --mask hole.png` (white = hole; without one, an outpainting mask is drawn).
A prompt alone, `--prompt "a red circle on a blue background" --full`, is text-to-image. With a subject's run of
train_rpo.py, `--prompt "a [V] square on a red background"` places the subject.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .data import masks as M
from .data.folders import SUFFIXES, read_image, read_mask
from .data.prompts import Prompts, text_prompts
from .data.scenes import SIZE
from .data.subjects import SUBJECT
from .evaluate import load_run, run_prompts
from .pipeline import Pipeline, Sampling
from .runtime.config import opt, parse
from .runtime.draw import grid, save, to_image
from .runtime.runlog import read_run


@dataclass(frozen=True)
class SampleConfig:
    run: str = opt("", "run folder of train_rl.py or train_rpo.py; empty: the base model alone")
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
    eta: float = opt(-1, "noise of the DDIM steps, 0 is deterministic; -1: that of an RPO run, or 1", lo=-1, hi=1)
    guidance: float = opt(-1, "classifier-free guidance scale; -1: that of an RPO run, or 1", lo=-1)
    seed: int = opt(0, "seed of the noise and of drawn masks", lo=0)
    out: str = opt("", "PNG to write; empty: sample.png in the run folder or here")
    device: str = opt("cpu", "cpu, cuda or mps")
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0, hi=1024)


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
    config = read_run(cfg.run) if cfg.run else {}
    script = "train_rpo.py" if "lam_val" in config else "train_rl.py"
    if script == "train_rpo.py":  # a subject placed by a prompt: text-to-image, sampled as in the run
        if cfg.image or not cfg.prompt:
            raise ValueError(f"--run {cfg.run}: a subject's run draws from a text; say --prompt 'a {SUBJECT} …'")
        if SUBJECT not in cfg.prompt:
            raise ValueError(f"--prompt {cfg.prompt!r}: name the subject by {SUBJECT}, as in 'a {SUBJECT} square'")
        cfg = replace(cfg, full=True, steps=cfg.steps or config.get("sample_steps", 0))
    own = config if script == "train_rpo.py" else {}
    for name, value in (("eta", cfg.eta), ("guidance", cfg.guidance)):
        if -1 < value < 0:
            raise ValueError(f"--{name} {value:g}: 0 or more, or -1 for the run's own")
    eta, guidance = (v if v >= 0 else own.get(k, 1.0) for k, v in (("eta", cfg.eta), ("guidance", cfg.guidance)))
    if cfg.run:
        config, pipe, aligned = load_run(cfg.run, cfg.checkpoint, cfg.device, script)
    else:
        pipe, aligned = Pipeline.load(cfg.weights, cfg.device), None
    if pipe.tokenizer.left_out(cfg.prompt):
        raise ValueError(f"--prompt: the text encoder reads {pipe.tokenizer.max_length - 2} words; shorten it")
    if unknown := pipe.tokenizer.unknown(cfg.prompt):
        print(f"note: the model has never seen: {', '.join(unknown)}")
    prompts = wanted(cfg, config)
    how = Sampling(cfg.steps or config.get("steps", 25), eta, guidance)
    models = [("base", pipe.unet)] + ([("aligned", aligned)] if aligned is not None else [])
    made = {name: pipe.complete(unet, prompts, how, seed=cfg.seed, epoch=0) for name, unet in models}
    rows = [] if cfg.full else [("prompt (grey = hole)", prompts.masked)]
    save(grid(rows + list(made.items()), cell=96, title=cfg.prompt), out)
    for name, images in made.items():  # at their own size, for further use
        for i, x in enumerate(images):
            save(to_image(x), out.with_suffix("") / f"{name}_{i:02d}.png")
    print(f"written: {out}, and each completion in {out.with_suffix('')}/")
