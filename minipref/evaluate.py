"""`python -m minipref evaluate --run RUN`: WinRate, rewards, KL and a grid of an aligned model, as a Markdown table.

Without a run: how much of a caption the base model's text-to-image obeys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import metrics
from .data.annotator import gold
from .data.folders import read_folder, split_pictures
from .data.prompts import Prompts, picture_prompts, scene_prompts, text_prompts
from .data.ratings import Ratings, denormalise, normalise
from .data.recognise import obeyed
from .data.scenes import CAPTION_SHARE, HELD_OUT_WORLD, SIZE, describe, scenes, world
from .diffusion import ddim_mean, predict
from .losses import gaussian_kl
from .models.unet import UNet
from .named_rewards import CheckedReward, load_reward
from .pipeline import Pipeline, Sampling, learned_reward, load_unet
from .report import rl_grid
from .rewards import LearnedReward
from .runtime.checkpoint import atomic_write
from .runtime.config import opt, parse
from .runtime.runlog import progress, read_json, read_run


@dataclass(frozen=True)
class EvaluateConfig:
    run: str = opt("", "run folder of train_rl.py; empty: the base model's text-to-image, by the toy's true measure")
    weights: str = opt("", "without --run: folder with unet.pt and clip.pt; empty: the shipped small ones")
    checkpoint: str = opt(
        "", "last, best, or empty: the weights that the run was judged by", choices=("", "last", "best")
    )
    prompts: int = opt(512, "held-out prompts, beyond those of the run's curves; captions of text-to-image", lo=8)
    guidance: float = opt(5.0, "without --run: classifier-free guidance scale of text-to-image", lo=0)
    best_of: int = opt(10, "with --run: S, the most samples a prompt", lo=1, hi=1000)
    steps: int = opt(0, "DDIM steps; 0: those of the run, 50 of text-to-image", lo=0)
    seed: int = opt(-1, "seed of the noise; -1: the run's, 0 of text-to-image", lo=-1)
    device: str = opt("cpu", "cpu, cuda or mps")
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0, hi=1024)


# What the configuration of a run must hold for the tools that read it.
KEYS = {
    "train_rl.py": ("weights", "data", "reward", "seed", "held_out", "eval_prompts", "steps", "eta"),
    "train_rpo.py": ("weights", "references", "lam_val", "sample_steps", "guidance", "eta"),
}


def load_run(folder: str, which: str, device: str, script: str = "train_rl.py") -> tuple[dict, Pipeline, UNet]:
    """-> a run's configuration, the base model's pipeline, and the trained UNet: last, best, or (which "") the one that
    its summary was judged by."""
    config = read_run(folder)
    path = Path(folder) / f"{which or judged_by(folder)}.pt"
    if missing := set(KEYS[script]) - set(config):
        raise ValueError(f"{Path(folder) / 'config.json'}: no run of {script}, it lacks {', '.join(sorted(missing))}")
    pipe = Pipeline.load(config.get("weights"), device)
    aligned, _, meta = load_unet(path)
    if meta.get("base") != pipe.fingerprint:
        raise ValueError(f"{path}: was trained from another base model than {config['weights'] or 'the shipped one'}")
    if aligned.config != pipe.unet.config:
        raise ValueError(f"{path}: its UNet is configured differently from the base model's ({pipe.unet.config})")
    return config, pipe, aligned.to(memory_format=torch.channels_last).to(pipe.device)  # type: ignore[call-overload]


def judged_by(folder: str | Path) -> str:
    """Which weights a run speaks of: "best" of RPO and where RL's guard has stopped it, by its log; else "last"."""
    log = Path(folder) / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    stopped = bool(lines) and '"stopped": true' in lines[-1]
    return "best" if stopped or "lam_val" in read_json(Path(folder) / "config.json") else "last"


def run_prompts(config: dict, start: int, count: int) -> Prompts:
    """Held-out prompts of a run's kind."""
    seed = world(HELD_OUT_WORLD, config.get("held_out", 0))
    if config.get("data"):
        _, held_out = split_pictures(read_folder(config["data"], SIZE)[0])
        return picture_prompts(held_out, seed, start, count)
    return scene_prompts(seed, start, count)


KL_NOISE = -4  # an "epoch" of its own: no training or evaluation draws its noise


@torch.no_grad()
def path_kl(pipe: Pipeline, aligned: UNet, prompts: Prompts, how: Sampling, seed: int) -> Tensor:
    """KL(aligned ‖ base) of whole rollouts in nats, (B,): per step in closed form, on paths of the aligned model."""
    path = pipe.sample(aligned, prompts, how, seed, KL_NOISE, range(len(prompts)))
    condition, total = pipe.condition(prompts), torch.zeros(len(prompts))
    for i in path.scored.nonzero()[:, 0].tolist():
        t, t_prev = path.times(i)
        means = []
        for unet in (aligned, pipe.unet):
            output = predict(unet, path.latents[:, i], t, condition, guidance=how.guidance)
            mean, sigma = ddim_mean(pipe.schedule, output, path.latents[:, i], t, t_prev, eta=how.eta)
            means.append(mean)
        total += gaussian_kl(means[0], means[1], sigma).cpu()
    return total


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


@dataclass(frozen=True)
class Judged:
    """A model on ratings that it has never seen, (N,) each, in units of the normalised label."""

    guess: Tensor
    truth: Tensor  # the noise-free label where it is known, else the raters' mean
    single: Tensor  # the first rater alone
    norm: Tensor
    gamma: Tensor
    figures: dict


def judge_reward(model: LearnedReward, r: Ratings, delta: float) -> Judged:
    """How good a reward model is on ratings that it has never seen, and how well it knows its own error."""
    norms, strata = model.calibration.label_norms, r.strata
    scores, z = model(r.images, r.prompts), model.z(r.images, r.prompts)
    guess, truth = model.ridge(z), r.labels if r.truth is None else r.truth
    y, single = (normalise(x.double(), strata, norms) for x in (truth, r.raters[:, 0]))
    bound, norm, error = model.bound(z, delta), scores.parts["norm"], (guess - y).abs()
    on_scale = denormalise(guess, strata, norms)  # 1 to 7 again, as the raters speak
    assert scores.trust is not None
    figures = {
        "spearman": metrics.spearman(on_scale, truth),
        "within_prompt_correlation": metrics.within_prompt_correlation(guess, y, r.groups),
        "r2": metrics.r_squared(on_scale, truth),
        "pair_accuracy": metrics.pair_accuracy(guess, y, r.groups),
        "mean_error_on_scale": float((on_scale - truth).abs().mean()),
        "bound_coverage": float((error <= bound).double().mean()),
        "bound_coverage_single_rating": float(((guess - single).abs() <= bound).double().mean()),
        "bound_median": float(bound.median()),
        "error_median": float(error.median()),
        "norm_error_spearman": metrics.spearman(norm, error),
        "trusted_share": float(scores.parts["trusted"].mean()),
        **metrics.quantiles(scores.trust, "gamma"),
    }
    return Judged(guess, y, single, norm, scores.trust, figures)


def on_policies(
    unets: dict[str, UNet], pipe: Pipeline, model: LearnedReward, how: Sampling, seed: int
) -> tuple[dict[str, Tensor], float]:
    """On completions of held-out toy prompts by the base model and by each run's policy: gamma (N,), and the Spearman
    correlation of norm and error against gold over all of them: does the norm tell where the reward is wrong?"""
    prompts = scene_prompts(world(HELD_OUT_WORLD, seed), 0, 128)
    short = ["base", *(Path(k).name for k in unets)]  # a name of its own for each, the whole path where need be
    policies = {"base": pipe.unet} | {n if short.count(n) == 1 else k: unets[k] for n, k in zip(short[1:], unets)}
    assert prompts.scenes is not None
    gammas, norms, errors = {}, [], []
    for name, unet in policies.items():
        images = pipe.complete(unet, prompts, how, seed=seed, epoch=1)
        scores, true = model(images, prompts), gold(images, prompts.masks, prompts.scenes).label.double()
        y = normalise(true, [f"toy/{k}" for k in prompts.kinds], model.calibration.label_norms)
        gammas[name] = scores.trust if scores.trust is not None else torch.ones(len(images))
        norms.append(scores.parts["norm"])
        errors.append((scores.value - y).abs())
    return gammas, metrics.spearman(torch.cat(norms), torch.cat(errors))


def base_report(cfg: EvaluateConfig) -> str:
    """In how many pictures the background, and shape and colours of each thing, are those that the caption names.

    By template (data/recognise.py), as Markdown: captions as in training, which name each attribute part of the time,
    and captions that name all. They are of a held-out world; of simple scenes, training has seen most (there are few).
    """
    pipe, seed = Pipeline.load(cfg.weights, cfg.device), max(cfg.seed, 0)
    how = Sampling(cfg.steps or 50, 1.0, cfg.guidance)
    settings = f"{how.steps} steps, eta {how.eta:g}, guidance {how.guidance:g}, seed {seed}"
    lines = [f"# Text-to-image, {cfg.prompts} captions, {settings}", "", "Share of pictures that show what was asked:"]
    batch, rng = scenes(world(HELD_OUT_WORLD, 0), 0, cfg.prompts), np.random.default_rng(world(HELD_OUT_WORLD, 0))
    for naming, chance in (
        (f"{100 * CAPTION_SHARE:.0f} % of the attributes named", rng),
        ("all attributes named", None),
    ):
        texts, said = zip(*[describe(s, chance) for s in batch])
        found = obeyed(pipe.complete(pipe.unet, text_prompts(list(texts)), how, seed=seed, epoch=0), list(said))
        things = torch.tensor([len(s.things) for s in said])
        lines += [
            "",
            f"Captions with {naming}:",
            "",
            "| things | captions | " + " | ".join(found) + " |",
            "|---" * (2 + len(found)) + "|",
        ]
        for name, own in [*((str(n), things == n) for n in things.unique().tolist()), ("any", things > 0)]:
            shares = {k: f"{float(v[own].double().mean()):.3f}" for k, v in found.items()}
            shares |= {"second": "–"} if name == "1" else {}
            lines.append(f"| {name} | {int(own.sum())} | " + " | ".join(shares.values()) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    cfg = parse(EvaluateConfig, argv, prog="minipref evaluate", description=__doc__ or "")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.run and cfg.weights:
        raise ValueError("--weights: belongs to text-to-image; a run knows the weights that it started from")
    if not cfg.run:
        print(base_report(cfg))
        return
    config, pipe, aligned = load_run(cfg.run, cfg.checkpoint, cfg.device)
    seed = config["seed"] if cfg.seed < 0 else cfg.seed
    how = Sampling(cfg.steps or config["steps"], config["eta"])
    prompts = run_prompts(config, config["eval_prompts"], cfg.prompts)
    encoder = pipe.clip, pipe.tokenizer
    named = load_reward(config["reward"], lambda: learned_reward(config["weights"]), lambda: encoder)
    reward = CheckedReward(config["reward"], named)

    def judged(unet: UNet, round: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Reward (P,), gold (P,) and pictures of one sample a prompt; every round draws its own noise."""
        images = pipe.complete(unet, prompts, how, seed=seed, epoch=round)
        true = gold(images, prompts.masks, prompts.scenes).label if prompts.scenes else None
        return reward(images, prompts).value, true, images

    # Rounds never share noise: 1000 the opponent, 2000 … the base's own samples, 3000 … the aligned model's. Training
    # epochs may reach them, but train on other prompts.
    jobs = [(pipe.unet, 1000)] + [
        (u, 1000 * k + i) for k, u in ((2, pipe.unet), (3, aligned)) for i in range(cfg.best_of)
    ]
    results = [judged(unet, round) for unet, round in progress(jobs, "samples")]
    sizes = [s for s in (1, 3, 10) if s <= cfg.best_of]
    lines = [f"# {cfg.run}, {cfg.checkpoint or judged_by(cfg.run)}.pt", ""]
    lines += [
        f"{cfg.prompts} held-out prompts, {how.steps} steps, eta {how.eta:g}, seed {seed}, independent noise.",
        "",
    ]
    judges = [("reward", 0)] + ([("gold", 1)] if prompts.scenes else [])
    for name, k in judges:
        rival = results[0][k]
        values = torch.stack([torch.as_tensor(r[k]) for r in results[1:]], 1)  # (P, 2·S): base, then aligned
        base, new = values[:, : cfg.best_of], values[:, cfg.best_of :]
        assert isinstance(rival, Tensor)
        lines += table(name, base, rival, new, sizes) + [""]
        lines += [f"| {name} | mean | variance over samplings of one prompt |", "|---|---|---|"]
        for model, v in (("base", base), ("aligned", new)):
            spread = f"{float(v.var(1).mean()):.3f}" if cfg.best_of > 1 else "one sampling"
            lines.append(f"| {model} | {float(v.mean()):.3f} | {spread} |")
        lines.append("")
    kl = path_kl(pipe, aligned, prompts.select(slice(0, 64)), how, seed)
    lines += [
        f"KL(aligned, base) of a whole rollout: {float(kl.mean()):.2f} nats, standard deviation {float(kl.std()):.2f}."
    ]

    text = "\n".join(lines) + "\n"
    print(text)
    out = Path(cfg.run)
    atomic_write(out / "evaluation.md", lambda p: p.write_text(text, encoding="utf-8"))
    rl_grid(out / "evaluation.png", prompts, results[1][2], results[1 + cfg.best_of][2], None)
    print(f"written: {out / 'evaluation.md'}, {out / 'evaluation.png'}")
