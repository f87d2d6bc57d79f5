"""Ratings -> features -> reward model with an error bound (PrefPaint Sections 3-4).

    python train_reward.py --small

Completions are rated and written to disk. A feature extractor learns from one part of the prompts. The last layer and
the matrix V of its error bound are solved for in closed form on a second part. A third part, never trained on, says how
good the result is and how far it knows its own error.
"""
# `main` is the course of it; below it stand its steps: rating, features, last layer, judgement.

from __future__ import annotations

from minipref.runtime.config import PICTURES, one_line, opt, parse, run_main, several  # isort: skip  (first: it answers Ctrl-C)
import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipref import metrics, reward_model
from minipref.data import rating_files
from minipref.data.ratings import HIGHEST, LOWEST, Ratings, label_norms, lonely, normalise, split_for_fit
from minipref.figures import gold_sheet, reward_pictures
from minipref.losses import bradley_terry_loss
from minipref.models.reward_features import ClipFeatures, RewardFeatures
from minipref.models.unet import UNet
from minipref.pipeline import Pipeline, Sampling
from minipref.presets import SMALL_FEATURES
from minipref.reward_model import Calibration, Judged, LearnedReward
from minipref.runs import RENAMED, load_pipeline, load_run
from minipref.runtime.checkpoint import write_text
from minipref.runtime.runlog import RunFolder, peak_memory_mb, progress
from minipref.toy import raters as toy_raters
from minipref.toy import world as toy_world

SCRIPT = "train_reward.py"


@dataclass(frozen=True)
class RewardConfig:
    preset: str = opt("", "named set of values; flags override it")
    seed: int = opt(0, "seed of prompts, noise, raters, splits and weights", lo=0, hi=999_999)
    # the ratings
    weights: str = opt("", "folder with unet.pt and clip.pt, or a run to start from; empty: the shipped small ones")
    ratings: str = opt("", "folder of ratings of your own; empty: toy completions, rated by simulated raters")
    score_lo: float = opt(LOWEST, "lowest score of the raters' scale", lo=-1e9)
    score_hi: float = opt(HIGHEST, "highest score of the raters' scale", lo=-1e9)
    second_round: str = opt("", "folder of an RL run whose policy's completions are rated and added")
    second_round_prompts: int = opt(300, "prompts of the second round", lo=8, hi=PICTURES)
    out: str = opt("", "run folder; empty: runs/reward-small, or the next free name")
    prompts: int = opt(17_000, "toy prompts that are completed and rated", lo=20, hi=PICTURES)
    samples: int = opt(3, "completions per prompt, beside two that are spoilt or mended on purpose", lo=2, hi=30)
    sampling_steps: int = opt(50, "DDIM steps per completion; as in RL", lo=2, hi=1000)
    # the features
    features: str = opt("clip", "CLIP's image tower, or a convolutional one for few pixels", choices=("conv", "clip"))
    freeze: float = opt(0.7, "share of the CLIP tower's layers that are not trained", lo=0, hi=1)
    objective: str = opt(
        "regression",
        "scores (regression), pairs of a prompt, or bins of scores",
        choices=("regression", "pairs", "bins"),
    )
    bins: int = opt(7, "number of bins of --objective bins, each with as many ratings", lo=2, hi=50)
    epochs: int = opt(40, "passes over the first split", lo=1)
    batch_size: int = opt(5, "rated pictures per batch", lo=2, hi=PICTURES)
    lr: float = opt(1e-5, "peak learning rate of AdamW; 0: 1.5e-3 for conv, 5e-4 for clip", lo=0)
    dim: int = opt(256, "d, length of the feature z", lo=1, hi=65_536)
    # the last layer, its bound and its trust
    lam: float = opt(0.01, "lam, ridge penalty of the last layer", lo=1e-9)
    delta: float = opt(0.05, "delta: every bound holds with probability 1 - delta", lo=1e-9, hi=1 - 1e-9)
    noise_scale: float = opt(0.0, "s, the noise of a label that the bound assumes; 0: estimated", lo=0)
    psi_norm: float = opt(0.0, "norm of psi_* that the bound assumes; 0: that of the fitted last layer", lo=0)
    trust: str = opt(
        "paper",
        "gamma: k 0.05 and b 0.7 with the paper's norm, or quantiles: 1 at the training norms' median, 1/2 at 95 %",
        choices=("quantiles", "paper"),
    )
    trust_lo: float = opt(1.0, "lowest gamma (the released code's)", lo=0)
    trust_hi: float = opt(2.21, "highest gamma (the released code's)", lo=0)
    # further tables and pictures
    compare: bool = opt(False, "also fit every kind of features and objective on these ratings and write a table")
    policies: str = opt("", "RL runs whose trust weights are plotted beside the base model's: RUN,RUN")
    device: str = opt("cpu", "cpu, cuda or mps")
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0, hi=1024)


# The defaults are PrefPaint's values; a preset is the table of its deviations from them.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {  # the toy world on a CPU, in minutes
        "prompts": 1536,
        "sampling_steps": 6,
        "features": "conv",  # CLIP normalises, and loses texture at a few pixels
        "batch_size": 32,
        "lr": 0.0,  # by the kind of features
        "dim": 64,
        "trust": "quantiles",  # the paper's constants belong to the scale of its own norm
        "trust_lo": 0.0,
        "trust_hi": 1e9,
    }
}
TOY_LR = {"conv": 1.5e-3, "clip": 5e-4}  # peak learning rates for few ratings and small pictures
RIVALS: dict[str, dict[str, Any]] = {
    "convolutional, scores": {"features": "conv", "objective": "regression"},
    "convolutional, pairs": {"features": "conv", "objective": "pairs"},
    "convolutional, bins": {"features": "conv", "objective": "bins"},
    "CLIP frozen, scores": {"features": "clip", "objective": "regression", "freeze": 1.0},
    "CLIP 0.7 frozen, scores": {"features": "clip", "objective": "regression", "freeze": 0.7},
    "CLIP free, scores": {"features": "clip", "objective": "regression", "freeze": 0.0},
}
COMPARED = ("pair_accuracy", "within_prompt_correlation", "spearman", "r2")
ON_POLICY = ("mean_error_on_scale", "spearman", "within_prompt_correlation")


def main() -> None:
    cfg = parse(RewardConfig, None, prog=SCRIPT, description=__doc__ or "", presets=PRESETS, renamed=RENAMED[SCRIPT])
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.trust_lo > cfg.trust_hi:
        raise ValueError(f"--trust-lo {cfg.trust_lo:g} --trust-hi {cfg.trust_hi:g}: the first must not be larger")
    started = time.time()
    pipe = load_pipeline(cfg.weights, cfg.device, steps=cfg.sampling_steps)
    names = [n for n in [*several(cfg.policies), cfg.second_round] if n]
    runs = {name: load_run(name, "", cfg.device) for name in names}
    if cfg.ratings:  # what cannot be learned from is refused before anything is written
        rated, problems, split = read(cfg.ratings, cfg, pipe)
        if cfg.second_round and rated.prompts.truth is None:
            raise ValueError("--second-round: simulated raters can add to ratings of toy scenes only")
    if cfg.second_round and runs[cfg.second_round][0]["data"]:
        raise ValueError(f"--second-round {cfg.second_round}: was aligned on pictures; the raters know toy scenes only")
    if not cfg.ratings or names:
        toy_world.check_size(pipe.image_size)
    run = RunFolder(cfg.out, f"runs/reward-{cfg.preset}", asdict(cfg), SCRIPT)
    print(f"this run writes to {run.path}")

    # 1. Rate: yours, or completions of the base model, rated and written to disk, then read back like yours.
    sampling = Sampling(cfg.sampling_steps)
    folders = [Path(x) for x in several(cfg.ratings)] or [run.path / "ratings"]
    if not cfg.ratings:
        rate(folders[0], pipe, pipe.unet, sampling, cfg, start=0, count=cfg.prompts)
        rated, problems, split = read(folders, cfg, pipe)
    describe(rated, problems)

    # 2. Features on the first split, last layer and V on the second, in closed form (Eqs. 3-4), judged on the third.
    model, noise = fit(split, cfg, pipe, run.log)
    judged = judge(model, split["judge"], cfg)
    figures = judged.figures | noise

    # 3. A second round: completions of an aligned policy are rated and added; the error on it before and after.
    if cfg.second_round:
        config, own, policy = runs[cfg.second_round]
        of_run, first = Sampling(config["sampling_steps"], config["eta"]), next_number(folders)
        second = run.path / "ratings-second"
        rate(second, own, policy, of_run, cfg, start=first, count=cfg.second_round_prompts, widened=False)
        earlier = len(rated)
        rated, problems, split = read([*folders, second], cfg, pipe)
        # Judged on prompts of the new round that neither fit has seen.
        new = split["judge"].select(~torch.isin(split["judge"].groups, rated.groups[:earlier]))
        before = judge(model, new, cfg).figures
        model, noise = fit(split, cfg, pipe, run.log)
        judged, after = judge(model, split["judge"], cfg), judge(model, new, cfg).figures
        figures = judged.figures | noise
        figures |= {f"policy_{k}_{when}": f[k] for k in ON_POLICY for when, f in (("before", before), ("after", after))}
        print("\n".join(f"on the policy, {k}: {before[k]:.3f} -> {after[k]:.3f}" for k in ON_POLICY))

    # 4. Save, and say what the bound promises and what it rests on.
    kind, gammas = "ratings" if rated.prompts.truth is None else "gold", dict[str, Tensor]()
    if kind == "gold" or runs:
        unets = {k: v[2] for k, v in runs.items()}
        gammas, norms, errors = toy_raters.trust_of_policies(unets, pipe, model, sampling, cfg.seed)
        figures |= {"norm_error_spearman_of_policies": metrics.spearman(norms, errors)} if runs else {}
    summary = figures | {
        "delta": cfg.delta,
        "judge": kind,
        "rated": len(rated),
        "left_out": len(problems),
        "seconds": time.time() - started,
        "peak_memory_mb": peak_memory_mb(),
        "seed": cfg.seed,
    }
    model.save(run.path / "reward.pt", {"seed": cfg.seed, **figures})
    run.write_json("summary.json", summary)
    reward_pictures(run.path, model, split["judge"], judged, kind, cfg.delta, gammas)
    if (gold := toy_raters.gold_labels(rated)) is not None:
        gold_sheet(run.path / "gold_sheet.png", rated.images, gold)
    print(conclusion(summary, model, cfg.delta))
    if cfg.compare:
        print(compare(split, cfg, pipe, run.path / "comparison.md"))
    print(f"look at {run.path / 'bound.png'} and {run.path / 'trust.png'}; use it: --reward model:{run.path}")


# ------------------------------------------------------------------------------------------------ 1. ratings


def rate(
    folder: str | Path,
    pipe: Pipeline,
    unet: UNet,
    sampling: Sampling,
    cfg: RewardConfig,
    *,
    start: int,
    count: int,
    widened: bool = True,
) -> None:
    """`unet` completes toy prompts number `start` …, simulated raters score them, `folder` keeps it all."""
    prompts = toy_world.prompt_source("rating", cfg.seed, pipe.image_size)(start, count)
    images = pipe.complete(
        unet, prompts.repeat_each(cfg.samples), sampling, seed=cfg.seed, stream="sample", first=start * cfg.samples
    )
    toy_raters.rate_completions(folder, prompts, images, seed=cfg.seed, start=start, widened=widened)


def read(folders: str | list[Path], cfg: RewardConfig, pipe: Pipeline) -> tuple[Ratings, list[str], dict[str, Ratings]]:
    """All usable ratings, what was left out and why, and the three splits."""
    low, high = (cfg.score_lo, cfg.score_hi) if cfg.ratings else (LOWEST, HIGHEST)
    rated, problems = rating_files.load(folders, pipe.image_size, low, high, truth=toy_world.shown_scene)
    return rated, problems, split_for_fit(rated, cfg.seed, cfg.dim, cfg.objective == "pairs")


def describe(rated: Ratings, problems: list[str]) -> None:
    print("".join(f"left out: {one_line(line)}\n" for line in problems[:5]), end="")
    print(f"{len(rated)} rated pictures of {len(rated.groups.unique())} prompts; {len(problems)} left out")
    if problems:
        print("python -m minipref check-data lists all that is wrong")
    if alone := lonely(rated.groups):
        print(f"{alone} prompts have a single rated picture: nothing says which completion of them is better")


def next_number(folders: list[Path]) -> int:
    """The first toy prompt of a further round: far beyond those of the first, after those of earlier rounds."""
    return max([500_000, *(1 + row.scene[1] for row in rating_files.scan(folders)[0] if row.scene)])


# ------------------------------------------------------------------------------------------------ 2. fitting


def new_features(cfg: RewardConfig, pipe: Pipeline) -> nn.Module:
    torch.manual_seed(cfg.seed)
    if cfg.features == "clip":
        return ClipFeatures.start_from(copy.deepcopy(pipe.clip).cpu(), cfg.dim, cfg.freeze)
    return RewardFeatures(replace(SMALL_FEATURES, dim=cfg.dim))


def fit_features(
    features: Any, r: Ratings, y: Tensor, cfg: RewardConfig, log: Callable = lambda **row: None
) -> nn.Module:
    """Trains the extractor, on the CPU, on normalised labels y (N,) of one split. Its last layer is thrown away."""
    dim, bins = features.config.dim, cfg.bins if cfg.objective == "bins" else 1
    torch.manual_seed(cfg.seed)
    last = nn.Linear(dim, bins, bias=bins > 1)
    edges = y.double().quantile(torch.linspace(0, 1, cfg.bins + 1, dtype=torch.float64)[1:-1]).float()
    trained = [p for p in [*features.parameters(), *last.parameters()] if p.requires_grad]
    peak = cfg.lr or TOY_LR[cfg.features]
    optimiser = torch.optim.AdamW(trained, lr=peak, weight_decay=0.01, fused=True)
    masked, masks = r.prompts.masked, r.prompts.masks
    per_epoch = -(-len(y) // cfg.batch_size)
    for epoch in progress(range(cfg.epochs), "reward features"):
        order = torch.randperm(len(y))
        if cfg.objective == "pairs":  # pictures of one prompt stay together
            order = torch.argsort(torch.randperm(int(r.groups.max()) + 1)[r.groups], stable=True)
        losses = []
        features.train()
        for k, at in enumerate(order.split(cfg.batch_size)):
            done = (epoch * per_epoch + k) / (cfg.epochs * per_epoch)
            warm = min(1.0, (epoch * per_epoch + k + 1) / 50)
            optimiser.param_groups[0]["lr"] = peak * warm * 0.5 * (1 + math.cos(math.pi * done))
            turned = (lambda x: x.flip(-1)) if (epoch + k) % 2 else (lambda x: x)  # mirrored every other time
            guess = last(features(*(turned(x[at]) for x in (r.images, masked, masks))))
            if cfg.objective == "regression":
                loss = (guess[:, 0] - y[at]).square().mean()
            elif cfg.objective == "pairs":
                loss = bradley_terry_loss(guess[:, 0], y[at], r.groups[at])
            else:
                loss = nn.functional.cross_entropy(guess, torch.bucketize(y[at], edges))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        log(epoch=epoch + 1, loss=sum(losses) / len(losses))
    with torch.no_grad():  # as they will be stored, so that what is judged is what is saved
        for x in [*features.parameters(), *features.buffers()]:
            x.copy_(x.half())
    return features.eval()


def solve(features: Any, r: Ratings, norms: dict, cfg: RewardConfig) -> tuple[LearnedReward, dict[str, float]]:
    """Last layer and V in closed form on a split that the features have not seen, so that Eqs. 3-10 apply.

    Returns the model and two estimates of the noise scale: from raters who rated the same picture, and from the
    residuals, which also hold what no linear layer explains. The bound assumes the larger, unless told otherwise.
    """
    y, z = normalise(r.labels, r.strata, norms), reward_model.features_of(features, r.images, r.prompts)
    ridge = reward_model.ridge_fit(z, y, cfg.lam)
    # A label is the mean of its raters: its noise is theirs over the root of their number, in normalised units.
    spread = torch.tensor([norms.get(s, norms[""])[1] for s in r.strata], dtype=torch.float64)
    raters = (~r.raters.isnan()).sum(1).double()
    repeated = float((r.noise_scale() / spread / raters.sqrt()).square().mean().sqrt())
    noise = {"noise_scale_raters": repeated, "noise_scale_residual": ridge.noise_from_residuals(z, y)}
    kind = "theorem" if cfg.trust == "quantiles" else "paper"
    norm = ridge.left_out_norm(ridge.norm(z))
    k, b = reward_model.trust_from_quantiles(norm) if cfg.trust == "quantiles" else reward_model.PAPER_TRUST
    calibration = Calibration(
        k,
        b,
        cfg.trust_lo,
        cfg.trust_hi,
        norm_kind=kind,
        norm_quantiles={str(q): float(norm.quantile(q)) for q in (0.05, 0.5, 0.95, 0.99)},
        label_norms=norms,
        noise_scale=cfg.noise_scale or max(x for x in noise.values() if math.isfinite(x)),
        psi_norm=cfg.psi_norm or float(ridge.psi.norm()),
        delta=cfg.delta,
    )
    return LearnedReward(features, ridge, calibration), noise


def fit(
    split: dict[str, Ratings], cfg: RewardConfig, pipe: Pipeline, log: Callable = lambda **row: None
) -> tuple[LearnedReward, dict[str, float]]:
    """Features on the first split, last layer and V on the second. -> the model, and what its bound assumes."""
    first = split["features"]
    norms = label_norms(first)
    features = fit_features(new_features(cfg, pipe), first, normalise(first.labels, first.strata, norms), cfg, log)
    model, noise = solve(features, split["ridge"], norms, cfg)
    c = model.calibration
    return model, noise | {"noise_scale": c.noise_scale, "psi_norm": c.psi_norm}


# ------------------------------------------------------------------------------------------------ 3, 4. its worth


def judge(model: LearnedReward, rated: Ratings, cfg: RewardConfig) -> Judged:
    """By gold, where somebody knows it, else by the raters' mean; neither was trained on."""
    return reward_model.judge_reward(model, rated, toy_raters.gold_labels(rated), cfg.delta)


def conclusion(s: dict, model: LearnedReward, delta: float) -> str:
    """How good the model is, and what its bound promises, in words."""
    return (
        f"Spearman {s['spearman']:.3f}, within a prompt {s['within_prompt_correlation']:.3f}, R² {s['r2']:.3f} against "
        f"{s['judge']}, on prompts never trained on\n"
        f"bound: with probability {1 - delta:g} every prediction is within {model.bound_factor(delta):.2f}·‖z‖ of "
        f"zᵀpsi_*; {model.assumptions()}\n"
        f"noise {s['noise_scale_raters']:.3f} by raters, {s['noise_scale_residual']:.3f} by residuals. Against "
        f"{s['judge']}: {s['bound_coverage']:.1%} of the errors lie under the bound, median error "
        f"{s['error_median']:.3f}, median bound {s['bound_median']:.2f}"
    )


def compare(split: dict[str, Ratings], cfg: RewardConfig, pipe: Pipeline, path: Path) -> str:
    """Every kind of features and objective on the same ratings; the last layer is the same ridge for all."""
    lines = ["| features, objective | " + " | ".join(COMPARED) + " | seconds |", "|---" * (len(COMPARED) + 2) + "|"]
    for name, changes in RIVALS.items():
        start = time.time()
        model, _ = fit(split, replace(cfg, lr=0.0, **changes), pipe)
        figures = judge(model, split["judge"], cfg).figures
        cells = [f"{figures[k]:.3f}" for k in COMPARED]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {time.time() - start:.0f} |")
    write_text(path, text := "\n".join(lines) + "\n")
    return text


if __name__ == "__main__":
    run_main(SCRIPT, main)
