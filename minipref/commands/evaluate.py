"""`python -m minipref evaluate --run RUN`: WinRate, rewards, KL and a grid of an aligned model, as a Markdown table.

Without a run: how much of a caption the base model's text-to-image obeys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import metrics
from ..data.prompts import Prompts, prompt_seed, text_prompts
from ..diffusion import STREAMS
from ..figures import rl_grid
from ..models.unet import UNet
from ..pipeline import Sampling
from ..rewards import load_reward
from ..runs import RENAMED, held_out_prompts, judged_by, load_pipeline, load_run
from ..runtime.checkpoint import check_folder, write_text
from ..runtime.config import PICTURES, check_pictures, opt, parse
from ..runtime.runlog import progress
from ..toy.judge import obeyed
from ..toy.raters import gold_reward, gold_scores
from ..toy.world import CAPTION_SHARE, describe, prompt_source, scenes


@dataclass(frozen=True)
class EvaluateConfig:
    run: str = opt("", "run folder of train_rl.py; empty: how many captions the base model's text-to-image obeys")
    weights: str = opt("", "folder with unet.pt and clip.pt, or a run; empty: the base of --run, or the shipped ones")
    data: str = opt("", "with --run: where the run's pictures lie now; empty: where they lay")
    reward: str = opt("", "with --run: the run's own reward function, module:function, which is then imported")
    checkpoint: str = opt("", "last, best, or empty: those of the run's final comparison", choices=("", "last", "best"))
    prompts: int = opt(
        512, "with --run: held-out prompts beyond those of its curves; without: captions", lo=8, hi=PICTURES
    )
    guidance: float = opt(5.0, "without --run: classifier-free guidance scale of text-to-image", lo=0)
    reward_batch: int = opt(64, "the most pictures that the reward is given at a time", lo=1, hi=100_000)
    best_of: int = opt(10, "with --run: S, the most samples a prompt", lo=1, hi=1000)
    sampling_steps: int = opt(0, "DDIM steps; 0: those of the run, or 50", lo=0, hi=1000)
    seed: int = opt(-1, "seed of the noise; -1: the run's, or 0", lo=-1)
    device: str = opt("cpu", "cpu, cuda or mps")
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0, hi=1024)


def table(judge: str, base: Tensor, rival: Tensor, aligned: Tensor, sizes: list[int]) -> list[str]:
    """WinRate of both models against one base sample: judge's scores base, aligned (P, S), and rival (P,)."""
    lines = [
        f"| WinRate by {judge} | S | win rate | 95 % Wilson | expected of the base: S/(S+1) |",
        "|---|---|---|---|---|",
    ]
    for name, values in (("base against itself", base), ("aligned against base", aligned)):
        for s in sizes:
            rate = metrics.win_rate(values[:, :s], rival)
            lo, hi = metrics.wilson_interval(rate, len(rival))
            expected = f"{metrics.self_win_rate(s):.3f}" if values is base else ""
            lines.append(f"| {name} | {s} | {rate:.3f} | {lo:.3f} to {hi:.3f} | {expected} |")
    return lines


def base_report(cfg: EvaluateConfig) -> str:
    """In how many pictures the background, and shape and colours of each thing, are those that the caption names.

    By template (toy/judge.py), as Markdown: captions as in training, which name each attribute part of the time,
    and captions that name all. They are of a held-out world; of simple scenes, training has seen most (there are few).
    """
    pipe, seed = load_pipeline(cfg.weights, cfg.device), max(cfg.seed, 0)
    sampling = Sampling(cfg.sampling_steps or 50, 1.0, cfg.guidance)
    settings = f"{sampling.steps} steps, eta {sampling.eta:g}, guidance {sampling.guidance:g}, seed {seed}"
    lines = [f"# Text-to-image, {cfg.prompts} captions, {settings}", "", "Share of pictures that show what was asked:"]
    world = prompt_seed("held out")
    batch, rng = scenes(world, 0, cfg.prompts), np.random.default_rng(world)
    for naming, chance in (
        (f"{100 * CAPTION_SHARE:.0f} % of the attributes named", rng),
        ("all attributes named", None),
    ):
        texts, named = zip(*[describe(s, chance) for s in batch])
        pictures = pipe.complete(pipe.unet, text_prompts(list(texts)), sampling, seed=seed, stream="sample")
        shares = obeyed(pictures, list(named))
        things = torch.tensor([len(s.things) for s in named])
        lines += [
            "",
            f"Captions with {naming}:",
            "",
            "| things | captions | " + " | ".join(shares) + " |",
            "|---" * (2 + len(shares)) + "|",
        ]
        for name, own in [*((str(n), things == n) for n in things.unique().tolist()), ("any", things > 0)]:
            cells = {k: f"{float(v[own].double().mean()):.3f}" for k, v in shares.items()}
            cells |= {"second": "–"} if name == "1" else {}
            lines.append(f"| {name} | {int(own.sum())} | " + " | ".join(cells.values()) + " |")
    return "\n".join(lines)


def without_paths(reward: str) -> str:
    """A reward's name without the places of reward models, which may have moved."""
    return re.sub(r"(?<![\w.])model:[^+]+", "model:", reward).replace(" ", "")


def run_report(cfg: EvaluateConfig) -> tuple[str, Prompts, Tensor, Tensor]:
    """WinRate at S = 1, 3, 10 by reward and gold, their means and variances, KL: Markdown; then what evaluation.png
    shows, prompts and a completion of each, base and aligned."""
    config, pipe, aligned = load_run(cfg.run, cfg.checkpoint, cfg.device, weights=cfg.weights, data=cfg.data)
    seed = config["seed"] if cfg.seed < 0 else cfg.seed
    sampling = Sampling(cfg.sampling_steps or config["sampling_steps"], config["eta"])
    toy = None if config["data"] else prompt_source("held out", config["held_out"], pipe.image_size)
    prompts = held_out_prompts(config, pipe.image_size, toy, config["eval_prompts"], cfg.prompts)
    name = cfg.reward or config["reward"]
    if without_paths(name) != without_paths(config["reward"]):
        raise ValueError(f"--reward {name}: the run's reward is {config['reward']}")
    reward = load_reward(name, pipe, {"gold": gold_reward}, batch_size=cfg.reward_batch, imports=bool(cfg.reward))

    def judged(unet: UNet, stream: int) -> dict[str, Tensor]:
        """One sample a prompt: its picture, reward and (of toy prompts) gold; every stream is noise of its own."""
        images = pipe.complete(unet, prompts, sampling, seed=seed, stream=stream)
        gold = gold_scores(images, prompts)
        scores = {"images": images, "reward": reward(images, prompts).value}
        return scores if gold is None else scores | {"gold": gold}

    jobs = [("evaluate opponent", 0, pipe.unet)]
    jobs += [("evaluate base", i, pipe.unet) for i in range(cfg.best_of)]
    jobs += [("evaluate aligned", i, aligned) for i in range(cfg.best_of)]
    opponent, *samples = [judged(unet, STREAMS[name] + i) for name, i, unet in progress(jobs, "samples")]
    base, new = samples[: cfg.best_of], samples[cfg.best_of :]
    lines = [
        f"# {cfg.run}, {cfg.checkpoint or judged_by(cfg.run)}.pt",
        "",
        f"{cfg.prompts} held-out prompts, {sampling.steps} steps, eta {sampling.eta:g}, seed {seed}, independent "
        "noise.",
        "",
    ]
    for judge in [k for k in ("reward", "gold") if k in opponent]:
        values = {name: torch.stack([s[judge] for s in part], 1) for name, part in (("base", base), ("aligned", new))}
        sizes = [s for s in (1, 3, 10) if s <= cfg.best_of]
        lines += [*table(judge, values["base"], opponent[judge], values["aligned"], sizes), ""]
        lines += [f"| {judge} | mean | variance over samplings of one prompt |", "|---|---|---|"]
        for name, v in values.items():  # (P, S)
            spread = f"{float(v.var(1).mean()):.3f}" if cfg.best_of > 1 else "one sampling"
            lines.append(f"| {name} | {float(v.mean()):.3f} | {spread} |")
        lines.append("")
    kl = pipe.kl_to_base(aligned, prompts.select(slice(0, 64)), sampling, seed=seed)
    lines.append(
        f"KL(aligned, base) of a whole rollout: {float(kl.mean()):.2f} nats, standard deviation {float(kl.std()):.2f}."
    )
    return "\n".join(lines) + "\n", prompts, base[0]["images"], new[0]["images"]


def main(argv: list[str] | None = None) -> None:
    cfg = parse(
        EvaluateConfig, argv, prog="python -m minipref evaluate", description=__doc__ or "", renamed=RENAMED["evaluate"]
    )
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.run:
        check_pictures(cfg, "prompts best_of")
    if cfg.run and cfg.guidance != EvaluateConfig.guidance:
        raise ValueError("--guidance: belongs to text-to-image, without --run")
    if not cfg.run and (cfg.data or cfg.reward):
        raise ValueError("--data, --reward: belong to a run; name it by --run")
    if not cfg.run:
        print(base_report(cfg))
        return
    out = Path(cfg.run)
    if out.is_dir():
        check_folder(out, f"--run {out}: evaluation.md could not be put there")
    text, prompts, base, aligned = run_report(cfg)
    print(text)  # first: whatever befalls the files, the work was not for nothing
    write_text(out / "evaluation.md", text)
    rl_grid(out / "evaluation.png", prompts, base, aligned, None)
    print(f"written: {out / 'evaluation.md'}, {out / 'evaluation.png'}")
