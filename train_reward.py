"""Ratings -> features -> reward model with an error bound (PrefPaint Sections 3-4).

    python train_reward.py --small

Completions are rated and written to disk; a feature extractor learns from one part of the prompts, the last layer and V
are solved for in closed form on a second part, and a third part, never trained on, says how good the result is and how
far it knows its own error. The whole algorithm stands in `main`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minipref.collect import collect
from minipref.data import rating_files
from minipref.data import ratings as R
from minipref.data.annotator import HIGHEST, LOWEST
from minipref.data.scenes import SIZE
from minipref.evaluate import judge_reward, load_run, on_policies
from minipref.fit_reward import FitConfig, fit
from minipref.pipeline import Pipeline, Sampling
from minipref.report import gold_sheet, reward_pictures
from minipref.runtime.config import opt, parse, run_main
from minipref.runtime.runlog import RunFolder, peak_memory_mb


@dataclass(frozen=True)
class RewardConfig(FitConfig):
    # the ratings
    weights: str = opt("", "folder with unet.pt and clip.pt; empty: the shipped small ones")
    ratings: str = opt("", "folder of ratings of your own; empty: toy completions, rated by simulated raters")
    score_lo: float = opt(LOWEST, "lowest score of the raters (PrefPaint: 1)")
    score_hi: float = opt(HIGHEST, "highest score of the raters (PrefPaint: 7)")
    resume_with: str = opt("", "folder of an RL run whose policy's completions are rated and added: a second round")
    second_prompts: int = opt(300, "prompts of the second round", lo=8)
    out: str = opt("", "run folder; empty: runs/reward-small, or the next free name")
    prompts: int = opt(1536, "toy prompts that are completed and rated", lo=20)
    samples: int = opt(3, "completions a prompt, beside two that are widened (PrefPaint: 3)", lo=2)
    steps: int = opt(6, "DDIM steps of a completion: those of RL", lo=2)
    compare: bool = opt(False, "also fit every kind of features and objective on these ratings and write a table")
    policies: str = opt("", "RL runs whose trust weights are drawn beside the base model's: RUN,RUN")
    device: str = opt("cpu", "cpu, cuda or mps")
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0, hi=1024)


PRESETS: dict[str, dict] = {"small": {}}


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


def read(folder: str | Path, cfg: RewardConfig) -> tuple[R.Ratings, list[str], dict[str, R.Ratings]]:
    """All usable ratings, what was left out and why, and the three splits."""
    low, high = (cfg.score_lo, cfg.score_hi) if cfg.ratings else (LOWEST, HIGHEST)
    rated, problems = rating_files.load(folder, SIZE, low, high)
    return rated, problems, R.split_for_fit(rated, cfg.seed, cfg.dim, cfg.objective == "pairs")


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
        rated, problems, split = read(cfg.ratings, cfg)
        if cfg.resume_with and rated.truth is None:
            raise ValueError("--resume-with: simulated raters can add to ratings of toy scenes only")
    if cfg.resume_with and runs[cfg.resume_with][0]["data"]:
        raise ValueError(f"--resume-with {cfg.resume_with}: was aligned on pictures; the raters know toy scenes only")
    run = RunFolder(cfg.out, "runs/reward-small", asdict(cfg))

    # 1. Ratings: yours, or completions of the base model, rated and written to disk, then read back like yours.
    how, folder = Sampling(cfg.steps), cfg.ratings or run.path / "ratings"
    if not cfg.ratings:
        collect(folder, pipe, pipe.unet, seed=cfg.seed, start=0, prompts=cfg.prompts, samples=cfg.samples, how=how)
        rated, problems, split = read(folder, cfg)
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
            start=next_number(folder),
            prompts=cfg.second_prompts,
            samples=cfg.samples,
            how=Sampling(config["steps"], config["eta"]),
            widened=False,
        )
        earlier = len(rated)
        rated, problems, split = read(f"{folder},{run.path / 'ratings-second'}", cfg)
        third = split["calibration"]  # judged on prompts of the new round that neither fit has seen
        new = third.select(~torch.isin(third.groups, rated.groups[:earlier]))
        before = judge_reward(model, new, cfg.delta).figures
        model, judged, figures = fit(split, cfg, pipe, run.log)
        after = judge_reward(model, new, cfg.delta).figures
        figures |= {f"policy_{k}_{when}": f[k] for k in ON_POLICY for when, f in (("before", before), ("after", after))}
        print("\n".join(f"on the policy, {k}: {before[k]:.3f} -> {after[k]:.3f}" for k in ON_POLICY))

    kind, gammas = "ratings" if rated.truth is None else "gold", dict[str, torch.Tensor]()
    if kind == "gold" or runs:
        gammas, across = on_policies({k: v[2] for k, v in runs.items()}, pipe, model, how, cfg.seed)
        figures |= {"norm_error_spearman_of_policies": across} if runs else {}
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


def next_number(folder: str | Path) -> int:
    """The first toy prompt of a further round: far beyond those of the first, after those of earlier rounds."""
    return max([500_000, *(1 + row.scene[1] for row in rating_files.scan(folder)[0] if row.scene)])


if __name__ == "__main__":
    run_main("train_reward.py", main)
