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

from ..data import masks as M
from ..data.pictures import SUFFIXES, read_image, read_mask
from ..data.prompts import Prompts, text_prompts
from ..models.tokenizer import SUBJECT
from ..pipeline import Sampling
from ..runs import RENAMED, held_out_prompts, judged_by, load_pipeline, load_run, read_config
from ..runtime.checkpoint import check_place, free_name
from ..runtime.config import opt, parse
from ..runtime.draw import grid, save, to_image
from ..toy.world import prompt_source


@dataclass(frozen=True)
class SampleConfig:
    run: str = opt("", "run folder of train_rl.py or train_rpo.py; empty: the base model alone")
    weights: str = opt("", "folder with unet.pt and clip.pt, or a run; empty: the base of --run, or the shipped ones")
    data: str = opt("", "with --run: where the run's pictures lie now; empty: where they lay")
    checkpoint: str = opt("", "last, best, or empty: those of the run's final comparison", choices=("", "last", "best"))
    image: str = opt("", "a picture to complete; empty: held-out prompts of the run")
    mask: str = opt("", "its mask: equally large, white = hole")
    prompt: str = opt("", "text condition; inpainting works without")
    full: bool = opt(False, "everything is hole: text-to-image")
    count: int = opt(8, "completions", lo=1, hi=10_000)
    sampling_steps: int = opt(0, "DDIM steps; 0: those of the run, or 25", lo=0, hi=1000)
    eta: float = opt(-1, "noise of the DDIM steps, 0 is deterministic; -1: that of an RPO run, or 1", lo=-1, hi=1)
    guidance: float = opt(-1, "classifier-free guidance scale; -1: that of an RPO run, or 1", lo=-1)
    seed: int = opt(0, "seed of the noise and of drawn masks", lo=0)
    out: str = opt("", "PNG to write; empty: sample.png in the run folder or here")
    device: str = opt("cpu", "cpu, cuda or mps")
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0, hi=1024)


def requested_prompts(cfg: SampleConfig, config: dict, size: int) -> Prompts:
    """The prompts that the command line asks for, `count` of them."""
    if cfg.mask and not cfg.image:
        raise ValueError("--mask needs the --image that it belongs to")
    if cfg.full and cfg.mask:
        raise ValueError("--full and --mask exclude each other")
    texts = [cfg.prompt] * cfg.count
    if cfg.image:
        picture = read_image(cfg.image, size)
        if cfg.mask:
            H, W = read_image(cfg.image, None).shape[-2:]
            masks = read_mask(cfg.mask, (H, W), size)[None].repeat(cfg.count, 1, 1, 1)
        else:
            kinds = {"full": 1.0} if cfg.full else {"square": 0.5, "strip": 0.5}
            masks, _ = M.random_masks(np.random.default_rng(cfg.seed), cfg.count, size, kinds)
        return Prompts(picture[None].repeat(cfg.count, 1, 1, 1), masks, texts, ["own"] * cfg.count)
    if cfg.full:
        return text_prompts(texts)
    toy = None if config.get("data") else prompt_source("held out", config.get("held_out", 0), size)
    prompts = held_out_prompts(config, size, toy, 0, cfg.count)
    return replace(prompts, texts=texts)


def check_subject(cfg: SampleConfig) -> None:
    """A subject's run draws from a text that names the subject."""
    if cfg.image or not cfg.prompt:
        raise ValueError(f"--run {cfg.run}: a subject's run draws from a text; say --prompt 'a {SUBJECT} …'")
    if SUBJECT not in cfg.prompt:
        raise ValueError(f"--prompt {cfg.prompt!r}: name the subject by {SUBJECT}, as in 'a {SUBJECT} square'")


def main(argv: list[str] | None = None) -> None:
    cfg = parse(
        SampleConfig, argv, prog="python -m minipref sample", description=__doc__ or "", renamed=RENAMED["sample"]
    )
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    out = Path(cfg.out) if cfg.out else free_name(Path(cfg.run) / "sample.png")
    if out.suffix.lower() not in SUFFIXES or out.is_dir():
        raise ValueError(f"--out {out}: name a picture file, such as sample.png")
    check_place(out, "--out")
    if out.with_suffix("").exists():
        raise ValueError(f"--out {out}: {out.with_suffix('')}, where the single pictures go, is there already")
    for name, value in (("eta", cfg.eta), ("guidance", cfg.guidance)):
        if -1 < value < 0:
            raise ValueError(f"--{name} {value:g}: 0 or more, or -1 for the run's own")
    if cfg.data and not cfg.run:
        raise ValueError("--data: belongs to a run; name it by --run")
    config = read_config(cfg.run) if cfg.run else {}
    of_subject = config.get("script") == "train_rpo.py"
    if of_subject:  # a subject placed by a prompt: text-to-image, sampled as in the run
        check_subject(cfg)
        cfg = replace(cfg, full=True)
    own = config if of_subject else {}
    eta, guidance = (v if v >= 0 else own.get(k, 1.0) for k, v in (("eta", cfg.eta), ("guidance", cfg.guidance)))
    if cfg.run:
        script = "train_rpo.py" if of_subject else "train_rl.py"
        config, pipe, aligned = load_run(
            cfg.run, cfg.checkpoint, cfg.device, script, weights=cfg.weights, data=cfg.data
        )
    else:
        pipe, aligned = load_pipeline(cfg.weights, cfg.device), None
    if pipe.tokenizer.left_out(cfg.prompt):
        raise ValueError(f"--prompt: the text encoder reads {pipe.tokenizer.max_length - 2} words; shorten it")
    if unknown := pipe.tokenizer.unknown(cfg.prompt):
        print(f"note: the model has never seen: {', '.join(unknown)}")
    prompts = requested_prompts(cfg, config, pipe.image_size)
    sampling = Sampling(cfg.sampling_steps or config.get("sampling_steps", 25), eta, guidance)
    models = {"base": pipe.unet} | ({"aligned": aligned} if aligned is not None else {})
    pictures = {k: pipe.complete(unet, prompts, sampling, seed=cfg.seed, stream="sample") for k, unet in models.items()}
    rows = [] if cfg.full else [("prompt (grey = hole)", prompts.masked)]
    save(grid(rows + list(pictures.items()), cell=96, title=cfg.prompt), out)
    for name, images in pictures.items():  # at their own size, for further use
        for i, x in enumerate(images):
            save(to_image(x), out.with_suffix("") / f"{name}_{i:02d}.png")
    by = f"; aligned: {cfg.checkpoint or judged_by(cfg.run)}.pt" if cfg.run else ""
    print(f"written: {out}, and each completion in {out.with_suffix('')}/{by}")
