"""Ratings -> features -> reward model with an error bound (PrefPaint Sections 3-4).

    python train_reward.py --small

Completions are rated and written to disk; a feature extractor learns from one part of the prompts, the last layer and V
are solved for in closed form on a second part, and a third part, never trained on, says how good the result is and how
far it knows its own error. The whole algorithm stands in `main`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipref.collect import collect
from minipref.data import ratings as R
from minipref.data.annotator import HIGHEST, LOWEST
from minipref.data.scenes import SIZE
from minipref.evaluate import Judged, judge_reward, load_run, policy_gammas
from minipref.losses import bradley_terry_loss
from minipref.models.reward_features import ClipFeatures, RewardFeatures
from minipref.pipeline import Pipeline, Sampling
from minipref.presets import SMALL_FEATURES
from minipref.report import gold_sheet, reward_pictures
from minipref.rewards import Calibration, LearnedReward, features_of, ridge_fit, trust_from_quantiles
from minipref.runtime.config import opt, parse, run_main
from minipref.runtime.runlog import RunFolder, peak_memory_mb, progress


@dataclass(frozen=True)
class RewardConfig:
    # the ratings
    weights: str = opt("", "folder with unet.pt and clip.pt; empty: the shipped small ones")
    ratings: str = opt("", "folder of ratings of your own; empty: toy completions, rated by simulated raters")
    score_lo: float = opt(LOWEST, "lowest score of the raters (PrefPaint: 1)")
    score_hi: float = opt(HIGHEST, "highest score of the raters (PrefPaint: 7)")
    resume_with: str = opt("", "folder of an RL run whose policy's completions are rated and added: a second round")
    second_prompts: int = opt(300, "prompts of the second round", lo=8)
    out: str = opt("", "run folder; empty: runs/reward-small, or the next free name")
    seed: int = opt(0, "seed of prompts, noise, raters, splits and weights", lo=0, hi=999_999)
    prompts: int = opt(1024, "toy prompts that are completed and rated", lo=20)
    samples: int = opt(3, "completions a prompt, beside two that are widened (PrefPaint: 3)", lo=2)
    steps: int = opt(6, "DDIM steps of a completion: those of RL", lo=2)
    # the features
    features: str = opt("conv", "conv, or clip as in PrefPaint", choices=("conv", "clip"))
    freeze: float = opt(0.7, "share of the CLIP tower's layers that stay as they are (PrefPaint: 0.7)", lo=0, hi=1)
    objective: str = opt(
        "regression",
        "what the features learn from: scores (PrefPaint), pairs of a prompt, or bins of scores",
        choices=("regression", "pairs", "bins"),
    )
    bins: int = opt(7, "bins of equal share, where the objective is bins", lo=2, hi=50)
    epochs: int = opt(40, "passes over the first split", lo=1)
    batch: int = opt(128, "rated pictures a batch (PrefPaint: 5)", lo=2)
    lr: float = opt(0.0, "peak learning rate of AdamW; 0: 2e-3 for conv, 5e-4 for clip (PrefPaint: 1e-5)", lo=0)
    dim: int = opt(64, "d, length of the feature z (PrefPaint: 256)", lo=1)
    # the last layer, its bound and its trust
    lam: float = opt(0.01, "lam, ridge penalty of the last layer (PrefPaint: 0.01)", lo=1e-9)
    delta: float = opt(0.05, "delta: every bound holds with probability 1 - delta", lo=1e-9, hi=1 - 1e-9)
    noise_scale: float = opt(0.0, "s, noise of a label that the bound assumes; 0: the larger of two estimates", lo=0)
    psi_norm: float = opt(0.0, "norm of the true last layer that the bound assumes; 0: that of the fitted one", lo=0)
    trust: str = opt(
        "quantiles",
        "gamma: quantiles (1 at the training norms' median, 1/2 at 95 %), or paper (k 0.05, b 0.7, its own norm)",
        choices=("quantiles", "paper"),
    )
    trust_lo: float = opt(0.0, "lowest gamma (PrefPaint's code: 1)", lo=0)
    trust_hi: float = opt(1e9, "highest gamma (PrefPaint's code: 2.21)", lo=0)
    compare: bool = opt(False, "also fit every kind of features and objective on these ratings and write a table")
    policies: str = opt("", "RL runs whose trust weights are drawn beside the base model's: RUN,RUN")
    device: str = opt("cpu", "cpu, cuda or mps")
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0)


PRESETS: dict[str, dict] = {"small": {}}


def new_features(cfg: RewardConfig, pipe: Pipeline) -> nn.Module:
    torch.manual_seed(cfg.seed)
    if cfg.features == "conv":
        return RewardFeatures(replace(SMALL_FEATURES, dim=cfg.dim))
    return ClipFeatures.start_from(copy.deepcopy(pipe.clip).cpu(), cfg.dim, cfg.freeze)


def fit_features(
    features: Any, r: R.Ratings, y: Tensor, cfg: RewardConfig, log: Callable = lambda **row: None
) -> nn.Module:
    """Trains the extractor, on the CPU, on normalised labels y (N,) of one split. Its last layer is thrown away."""
    dim, bins = features.config.dim, cfg.bins if cfg.objective == "bins" else 1
    torch.manual_seed(cfg.seed)
    last = nn.Linear(dim, bins, bias=bins > 1)
    edges = y.double().quantile(torch.linspace(0, 1, cfg.bins + 1, dtype=torch.float64)[1:-1]).float()
    peak = cfg.lr or (2e-3 if cfg.features == "conv" else 5e-4)
    trained = [p for p in [*features.parameters(), *last.parameters()] if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=peak, weight_decay=0.01)
    masked, masks = r.prompts.masked, r.prompts.masks
    per_epoch = -(-len(y) // cfg.batch)
    for epoch in progress(range(cfg.epochs), "reward features"):
        order = torch.randperm(len(y))
        if cfg.objective == "pairs":  # pictures of one prompt stay together
            order = torch.argsort(torch.randperm(int(r.groups.max()) + 1)[r.groups], stable=True)
        losses = []
        features.train()
        for k, at in enumerate(order.split(cfg.batch)):
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


def solve(features: Any, r: R.Ratings, norms: dict, cfg: RewardConfig) -> tuple[LearnedReward, dict[str, float]]:
    """Last layer and V in closed form on a split that the features have not seen, so that Eqs. 3-10 apply.

    Returns the model and two estimates of the noise scale: from raters who rated the same picture, and from the
    residuals, which also hold what no linear layer explains. The bound assumes the larger, unless told otherwise.
    """
    if len(r) <= cfg.dim:
        raise ValueError(f"the second split holds {len(r)} ratings for --dim {cfg.dim}: rate more or lower --dim")
    y, z = R.normalise(r.labels, r.strata, norms), features_of(features, r.images, r.prompts)
    ridge = ridge_fit(z, y, cfg.lam)
    # A label is the mean of its raters: its noise is theirs over the root of their number, in normalised units.
    spread = torch.tensor([norms.get(s, norms[""])[1] for s in r.strata], dtype=torch.float64)
    raters = (~r.raters.isnan()).sum(1).double()
    repeated = float((r.noise_scale() / spread / raters.sqrt()).square().mean().sqrt())
    noise = {"noise_scale_raters": repeated, "noise_scale_residual": ridge.noise_from_residuals(z, y)}
    kind = "theorem" if cfg.trust == "quantiles" else "paper"
    norm = ridge.left_out_norm(ridge.norm(z))
    k, b = trust_from_quantiles(norm) if cfg.trust == "quantiles" else (0.05, 0.7)
    calibration = Calibration(
        k,
        b,
        cfg.trust_lo,
        cfg.trust_hi,
        kind,
        {str(q): float(norm.quantile(q)) for q in (0.05, 0.5, 0.95, 0.99)},
        norms,
        cfg.noise_scale or max(x for x in noise.values() if math.isfinite(x)),
        cfg.psi_norm or float(ridge.psi.norm()),
    )
    return LearnedReward(features, ridge, calibration), noise


def fit(
    r: dict[str, R.Ratings], cfg: RewardConfig, pipe: Pipeline, log: Callable = lambda **row: None
) -> tuple[LearnedReward, Judged, dict]:
    """Features on the first split, last layer and V on the second, figures on the third's completions."""
    norms = R.label_norms(r["features"])
    y = R.normalise(r["features"].labels, r["features"].strata, norms)
    features = fit_features(new_features(cfg, pipe), r["features"], y, cfg, log)
    model, noise = solve(features, r["ridge"], norms, cfg)
    judged = judge_reward(model, r["calibration"], cfg.delta)
    c = model.calibration
    return model, judged, judged.figures | noise | {"noise_scale": c.noise_scale, "psi_norm": c.psi_norm}


RIVALS: dict[str, dict[str, Any]] = {
    "convolutional, scores": {"features": "conv", "objective": "regression"},
    "convolutional, pairs": {"features": "conv", "objective": "pairs"},
    "convolutional, bins": {"features": "conv", "objective": "bins"},
    "CLIP frozen, scores": {"features": "clip", "objective": "regression", "freeze": 1.0},
    "CLIP 0.7 frozen, scores": {"features": "clip", "objective": "regression", "freeze": 0.7},
    "CLIP free, scores": {"features": "clip", "objective": "regression", "freeze": 0.0},
}
COMPARED = ("pair_accuracy", "within_prompt_correlation", "spearman", "r2")


def compare(split: dict[str, R.Ratings], cfg: RewardConfig, pipe: Pipeline, path: Path) -> str:
    """Every kind of features and objective on the same ratings; the last layer is the same ridge for all."""
    lines = ["| features, objective | " + " | ".join(COMPARED) + " | seconds |", "|---" * (len(COMPARED) + 2) + "|"]
    for name, changes in RIVALS.items():
        start = time.time()
        _, _, figures = fit(split, replace(cfg, lr=0.0, **changes), pipe)
        cells = [f"{figures[k]:.3f}" for k in COMPARED]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {time.time() - start:.0f} |")
    text = "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8")
    return text


def main() -> None:
    cfg = parse(RewardConfig, None, prog="train_reward.py", description=__doc__ or "", presets=PRESETS)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.trust_lo > cfg.trust_hi:
        raise ValueError(f"--trust-lo {cfg.trust_lo:g} --trust-hi {cfg.trust_hi:g}: the first must not be larger")
    started = time.time()
    pipe = Pipeline.load(cfg.weights, cfg.device)
    names = [n for n in f"{cfg.policies},{cfg.resume_with}".split(",") if n]
    runs = {name: load_run(name, "", cfg.device) for name in names}
    if cfg.ratings:  # what cannot be learned from is refused before anything is written
        rated, problems = R.load(cfg.ratings, SIZE, cfg.score_lo, cfg.score_hi)
        split = R.split_for_fit(rated, cfg.seed, cfg.objective == "pairs")
    run = RunFolder(cfg.out, "runs/reward-small", asdict(cfg))

    # 1. Ratings: yours, or completions of the base model, rated and written to disk, then read back like yours.
    how = Sampling(cfg.steps)
    if not cfg.ratings:
        folder = run.path / "ratings"
        collect(folder, pipe, pipe.unet, seed=cfg.seed, start=0, prompts=cfg.prompts, samples=cfg.samples, how=how)
        rated, problems = R.load(folder, SIZE)
        split = R.split_for_fit(rated, cfg.seed, cfg.objective == "pairs")
    for line in problems[:5]:
        print(f"left out: {line}")
    print(f"{len(rated)} rated pictures of {len(rated.groups.unique())} prompts; {len(problems)} left out")
    if problems:
        print("python -m minipref check-data lists all that is wrong")
    if alone := R.lonely(rated.groups):
        print(f"{alone} prompts have a single rated picture: nothing says which completion of them is better")

    # 2. Features, last layer, bound.
    model, judged, figures = fit(split, cfg, pipe, run.log)

    # 3. A second round: completions of an aligned policy are rated and added; the error on it before and after.
    if cfg.resume_with:
        config, own, policy = runs[cfg.resume_with]
        collect(
            run.path / "ratings-second",
            own,
            policy,
            seed=cfg.seed,
            start=next_number(rated),
            prompts=cfg.second_prompts,
            samples=cfg.samples,
            how=Sampling(config["steps"], config["eta"]),
            widened=False,
        )
        new = R.split_for_fit(R.load(run.path / "ratings-second", SIZE)[0], cfg.seed)
        before = judge_reward(model, new["calibration"], cfg.delta).figures
        split = {k: R.join(split[k], new[k]) for k in split}
        model, judged, figures = fit(split, cfg, pipe, run.log)
        after = judge_reward(model, new["calibration"], cfg.delta).figures
        figures |= {f"policy_{k}_{when}": f[k] for k in ON_POLICY for when, f in (("before", before), ("after", after))}
        print("\n".join(f"on the policy, {k}: {before[k]:.3f} -> {after[k]:.3f}" for k in ON_POLICY))

    kind = "ratings" if rated.truth is None else "gold"
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

    # 4. Pictures, and where asked for, the rivals on the same ratings.
    gammas = (
        policy_gammas({k: v[2] for k, v in runs.items()}, pipe, model, how, cfg.seed) if kind == "gold" or runs else {}
    )
    reward_pictures(run.path, model, split["calibration"], judged, kind, cfg.delta, gammas)
    if rated.truth is not None:
        gold_sheet(run.path / "gold_sheet.png", rated.images, rated.truth)
    print(
        f"Spearman {summary['spearman']:.3f}, within a prompt {summary['within_prompt_correlation']:.3f}, R² "
        f"{summary['r2']:.3f} against {kind}, on prompts never trained on"
    )
    print(
        f"bound: with probability {1 - cfg.delta:g} every prediction is within {model.bound_factor(cfg.delta):.2f}·‖z‖ "
        f"of zᵀpsi_*; {model.assumptions()}"
    )
    print(
        f"noise {figures['noise_scale_raters']:.3f} by raters, {figures['noise_scale_residual']:.3f} by residuals. "
        f"Against {kind}: {summary['bound_coverage']:.1%} of the errors lie under the bound, "
        f"median error {summary['error_median']:.3f}, median bound {summary['bound_median']:.2f}"
    )
    if cfg.compare:
        print(compare(split, cfg, pipe, run.path / "comparison.md"))
    print(f"look at {run.path / 'bound.png'} and {run.path / 'trust.png'}; use it: --reward model:{run.path}")


ON_POLICY = ("mean_error_on_scale", "spearman", "within_prompt_correlation")


def next_number(rated: R.Ratings) -> int:
    """The first toy prompt of a further round: far beyond those of the first, after those of earlier rounds."""
    return 500_000 + len(rated.groups.unique())


if __name__ == "__main__":
    run_main("train_reward.py", main)
