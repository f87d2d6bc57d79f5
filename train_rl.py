"""Aligns an inpainting diffusion model with a preference by reinforcement learning (PrefPaint; DDPO).

    python train_rl.py --small

Each epoch: complete a few prompts (a prompt is a masked picture) several times, score the completions, and make the
better ones of each prompt more probable, each sample weighted by how far its reward can be trusted.
"""
# `main` is the algorithm; below it stand the checks, one row of the log, and the final comparison.

from __future__ import annotations

from minipref.runtime.config import check_pictures, opt, parse, printable, run_main  # isort: skip  (first: it answers Ctrl-C)
import copy
import math
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minipref import metrics
from minipref.data.pictures import picture_list
from minipref.data.prompts import Prompts, PromptSource, picture_sources
from minipref.diffusion import Condition, Trajectory, replay
from minipref.figures import rl_curves, rl_grid
from minipref.guard import Guard
from minipref.losses import advantages, clipped_surrogate, gaussian_kl
from minipref.pipeline import Pipeline, Sampling
from minipref.reward_model import Scores
from minipref.rewards import CheckedReward, Reward, load_reward
from minipref.runs import RENAMED, absolute, load_pipeline
from minipref.runtime import checkpoint
from minipref.runtime.runlog import RunFolder, peak_memory_mb, progress
from minipref.toy import raters as toy_raters
from minipref.toy import world as toy_world

SCRIPT = "train_rl.py"


@dataclass(frozen=True)
class RLConfig:
    # what is aligned, with what
    preset: str = opt("", "named set of values; flags override it")
    weights: str = opt("", "folder with unet.pt and clip.pt, or a run to train on from; empty: the shipped small ones")
    data: str = opt("", "folder of your own pictures as prompts; empty: toy scenes")
    reward: str = opt("model", "model, model:RUN, clip:TEXT, brightness, jpeg_size, gold, a*x+b*y, module:function …")
    out: str = opt("", "run folder; empty: runs/rl-small, or the next free name")
    seed: int = opt(0, "seed of prompts, noise and order", lo=0, hi=999_999)
    # rollouts
    epochs: int = opt(1000, "rounds of rollout and update", lo=1)
    prompts: int = opt(16, "prompts per epoch", lo=1)
    samples: int = opt(1, "completions per prompt; they are compared with one another", lo=1)
    sampling_steps: int = opt(50, "T, DDIM steps per completion", lo=2, hi=1000)
    eta: float = opt(1.0, "randomness of the steps, 1 as in DDPM; 0 is refused: RL needs random steps", lo=0, hi=1)
    # updates
    train_steps: int = opt(5, "K, how many of a completion's T steps are trained, picked at random", lo=1)
    updates_per_epoch: int = opt(1, "optimiser steps per epoch; the samples are divided among them", lo=1)
    lr: float = opt(2e-6, "learning rate of AdamW", lo=0)
    weight_decay: float = opt(0.01, "weight decay of AdamW", lo=0)
    grad_clip: float = opt(0.0, "largest gradient norm; 0: none", lo=0)
    clip_range: float = opt(1.64, "PPO's clip of the log-ratio, summed over dimensions (REFERENCE.md)", lo=0.01)
    trust: str = opt(
        "exponential",
        "weight of a sample (PrefPaint Eq. 12): the reward's gamma, its mean for all (constant), or 1 (off)",
        choices=("exponential", "constant", "off"),
    )
    kl_weight: float = opt(0.0, "kappa, weight of the KL to the base model (PrefPaint Eq. 1; its code: 0)", lo=0)
    guard: float = opt(0.0, "stop when the trusted share falls below this part of the base's; 0: never", lo=0, hi=1)
    ema: float = opt(0.0, "decay of the averaged weights, which are evaluated and saved; 0: none", lo=0, hi=0.9999)
    micro_batch: int = opt(16, "steps per backward pass; smaller needs less memory and gives the same gradient", lo=1)
    # what is logged
    reward_batch: int = opt(64, "the most pictures that the reward is given at a time", lo=1, hi=100_000)
    eval_every: int = opt(5, "epochs between evaluations", lo=1)
    eval_prompts: int = opt(64, "number of fixed held-out prompts of the curves", lo=8)
    win_prompts: int = opt(256, "number of held-out prompts of the final WinRate", lo=8)
    held_out: int = opt(0, "seed that selects the held-out prompts", lo=0, hi=999_999)
    device: str = opt("cpu", "cpu, cuda or mps")
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0, hi=1024)


# The defaults are PrefPaint's values; a preset is the table of its deviations from them.
SMALL = {  # the toy world on a CPU, in minutes
    "epochs": 40,
    "samples": 4,
    "sampling_steps": 6,
    "updates_per_epoch": 2,
    "lr": 1e-4,
    "grad_clip": 1.0,
    "kl_weight": 0.03,  # keeps the policy from drifting where the reward is blind (tutorials/LOG.md)
    "guard": 0.5,
    "ema": 0.9,
    "micro_batch": 64,
}
PRESETS = {"small": SMALL}
EXTRA_REWARDS: dict[str, Reward] = {
    "gold": toy_raters.gold_reward,
}
SHOWN = ("reward", "kl", "clip_fraction", "eval_gold")  # on the progress bar
ROUNDING = 0.005  # nats by which sums over a whole picture may differ from batch to batch


def main() -> None:
    cfg = parse(RLConfig, None, prog=SCRIPT, description=__doc__ or "", presets=PRESETS, renamed=RENAMED[SCRIPT])
    check(cfg)
    started = time.time()
    pipe = load_pipeline(cfg.weights, cfg.device, steps=cfg.sampling_steps)
    reward = load_reward(cfg.reward, pipe, EXTRA_REWARDS, batch_size=cfg.reward_batch)
    training_prompts, held_out_prompts = prompt_sources(cfg, pipe.image_size)
    curve_prompts, sampling = held_out_prompts(0, cfg.eval_prompts), Sampling(cfg.sampling_steps, cfg.eta)
    before = pipe.complete(pipe.unet, curve_prompts, sampling, seed=cfg.seed, stream="curves")
    reward.try_out(before, curve_prompts)  # a reward that cannot be used is refused before anything is written
    run = RunFolder(cfg.out, f"runs/rl-{cfg.preset}", asdict(cfg) | places(cfg), SCRIPT)
    print(f"this run writes to {run.path}")

    base, policy = pipe.unet.requires_grad_(False), copy.deepcopy(pipe.unet).requires_grad_(True)
    average = copy.deepcopy(policy).requires_grad_(False)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    order, guard, stopped = np.random.default_rng([cfg.seed, 1]), Guard(cfg.guard), None
    best: dict[str, Tensor] = {}
    meta: dict = {"schedule": asdict(pipe.schedule.config), "base": pipe.fingerprint}
    B = cfg.prompts * cfg.samples
    groups = torch.arange(cfg.prompts).repeat_interleave(cfg.samples)

    bar = progress(range(cfg.epochs + 1), "RL")
    for epoch in bar:  # epoch 0 only evaluates: the base model
        row: dict = {}
        if epoch > 0:
            # 1. Roll out: every prompt `samples` times, each step's Gaussian log-probability kept (PrefPaint Eq. 2).
            prompts = training_prompts((epoch - 1) * cfg.prompts, cfg.prompts).repeat_each(cfg.samples)
            condition = pipe.condition(prompts)
            trajectory = pipe.rollout(policy, prompts, sampling, cfg.seed, epoch, range(B), condition)
            n, scored = trajectory.latents[0, 0].numel(), trajectory.scored.nonzero()[:, 0]

            # 2. Score: reward, trust weight, advantage within each prompt's group.
            images = pipe.decode(trajectory, prompts)
            scores = reward(images, prompts)
            advantage = advantages(scores.value, groups).to(pipe.device)
            gamma = trust_weights(scores, cfg.trust).to(pipe.device)
            if epoch == 1:
                check_replay(policy, pipe, trajectory, condition, cfg)

            # 3. Update: K random steps of each sample, several optimiser steps on disjoint samples.
            K = min(cfg.train_steps, len(scored))
            log: dict[str, list] = {k: [] for k in ("loss", "ratio", "clipped", "grad_norm", "kl")}
            for part in torch.from_numpy(order.permutation(B)).tensor_split(cfg.updates_per_epoch):
                steps = torch.cat([scored[order.permutation(len(scored))[:K]] for _ in part])
                pairs = torch.stack([part.repeat_interleave(K), steps], 1)  # (M·K, 2): sample, step
                for chunk in pairs.split(cfg.micro_batch):
                    sample, step = chunk.unbind(1)
                    steps_taken = pipe.schedule, trajectory, condition, sample, step
                    log_prob, mean, sigma = replay(policy, *steps_taken, eta=cfg.eta)
                    old, weights = trajectory.log_probs[sample, step], gamma[sample]
                    loss, ratio, clipped = clipped_surrogate(
                        log_prob, old, advantage[sample], clip_range=cfg.clip_range, n=n, gamma=weights
                    )
                    if cfg.kl_weight > 0:
                        with torch.no_grad():
                            _, mean_base, _ = replay(base, *steps_taken, eta=cfg.eta)
                        kl = gaussian_kl(mean, mean_base, sigma)
                        loss = loss + cfg.kl_weight * kl.mean() / n
                        log["kl"].append(kl.detach() * len(scored))  # K steps stand for all scored ones
                    (loss * len(chunk) / len(pairs)).backward()
                    log["loss"].append(loss.item() * len(chunk) / len(pairs) / cfg.updates_per_epoch)
                    log["ratio"].append(ratio)
                    log["clipped"].append(clipped)
                norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip or math.inf)
                log["grad_norm"].append(float(norm))
                optimiser.step()
                optimiser.zero_grad()
                with torch.no_grad():
                    torch._foreach_lerp_(list(average.parameters()), list(policy.parameters()), 1 - cfg.ema)
            row = training_row(scores, gamma.cpu(), log, n) | {
                "within_prompt_std": metrics.within_prompt_std(scores.value, groups),
                "diversity": metrics.diversity(images, prompts.masks, groups),
            }

        # 4. Evaluate the averaged policy on fixed held-out prompts, with noise that never changes; keep the best.
        if epoch % cfg.eval_every == 0 or epoch == cfg.epochs:
            if epoch > 0 and cfg.kl_weight == 0:
                one_each = torch.arange(0, B, cfg.samples)  # one sample a prompt
                row["kl"] = float(pipe.trajectory_kl(policy, trajectory, condition, one_each, sampling).mean())
            pictures = pipe.complete(average, curve_prompts, sampling, seed=cfg.seed, stream="curves")
            row |= evaluation_row(reward(pictures, curve_prompts), gold_scores(pictures, curve_prompts))
            judged = row["eval_reward"], row.get("eval_trusted"), row.get("eval_bound")
            keep, stop = guard.look(*judged) if epoch > 0 else guard.start(*judged)
            best = copy.deepcopy(average.state_dict()) if keep else best
            stopped = epoch if stop else None
            meta["epoch"] = epoch
            for name in ["last.pt"] + (["best.pt"] if keep else []):
                checkpoint.save(run.path / name, "unet", average.config, average.state_dict(), meta=meta)
            rl_grid(run.path / "samples" / f"{epoch:06d}.png", curve_prompts, before, pictures, epoch)
        run.log(epoch=epoch, **row, **({"stopped": True} if stopped else {}), seconds=time.time() - started)
        if "eval_reward" in row:
            rl_curves(run)
        bar.set_postfix({k: f"{row[k]:.2f}" for k in SHOWN if k in row}, refresh=False)
        if stopped:
            average.load_state_dict(best)
            print(f"stopped after epoch {stopped}: more reward, but less of it certain; best.pt counts")
            break

    # 5. Compare with the base model: other held-out prompts, independent noise for the two.
    prompts = held_out_prompts(cfg.eval_prompts, cfg.win_prompts)
    completions = {
        name: pipe.complete(unet, prompts, sampling, seed=cfg.seed, stream=f"judge {name}")
        for name, unet in (("base", base), ("aligned", average))
    }
    summary = comparison(completions, prompts, reward) | {
        "kl": float(pipe.kl_to_base(average, prompts.select(slice(0, 64)), sampling, seed=cfg.seed).mean()),
        "stopped": stopped,
        "judged": "best" if stopped else "last",
        "seconds": time.time() - started,
        "peak_memory_mb": peak_memory_mb(),
        "seed": cfg.seed,
    }
    run.write_json("summary.json", summary)
    print(f"{run.path}: {conclusion(summary, len(prompts))}")
    print(f"look at {run.path / 'samples'} and {run.path / 'curves.png'}")


# ------------------------------------------------------------------------------------------------ before the loop


def check(cfg: RLConfig) -> None:
    """Refuses what cannot be trained; sets threads and seed."""
    if cfg.eta < 0.05:
        raise ValueError(f"--eta {cfg.eta}: the steps are deterministic and have no probability to raise; choose 1")
    if cfg.train_steps > max(cfg.sampling_steps, RLConfig.train_steps):
        raise ValueError(f"--train-steps {cfg.train_steps}: a completion has --sampling-steps {cfg.sampling_steps}")
    check_pictures(cfg, "prompts samples", "eval_prompts", "win_prompts")
    if cfg.prompts * cfg.samples == 1:
        raise ValueError("--prompts 1 --samples 1: a single completion is neither better nor worse than another")
    if cfg.updates_per_epoch > cfg.prompts * cfg.samples:
        completions = cfg.prompts * cfg.samples
        raise ValueError(f"--updates-per-epoch {cfg.updates_per_epoch}: more than the {completions} completions")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)


def prompt_sources(cfg: RLConfig, size: int) -> tuple[PromptSource, PromptSource]:
    """Two functions (start, count) -> Prompts of `size` pixels: for training, and held out."""
    if not cfg.data:  # prompts of the toy world
        return toy_world.prompt_source("rl", cfg.seed, size), toy_world.prompt_source("held out", cfg.held_out, size)
    training, held_out, lines = picture_sources(cfg.data, size, cfg.seed, cfg.held_out)
    print("\n".join(map(printable, lines)))
    return training, held_out


def places(cfg: RLConfig) -> dict[str, str]:
    """Folders as absolute paths, and which pictures lie there: what a run is reopened by."""
    reward = re.sub(r"(?<![\w.])model:([^+]+)", lambda m: f"model:{Path(m[1].strip()).resolve()}", cfg.reward)
    pictures = {"pictures": picture_list(cfg.data)} if cfg.data else {}
    return {"reward": reward, "weights": absolute(cfg.weights), "data": absolute(cfg.data)} | pictures


# ------------------------------------------------------------------------------------------------ in the loop


def trust_weights(scores: Scores, kind: str) -> Tensor:
    """gamma of each sample (B,) (PrefPaint Eqs. 11-12): as the reward gives it, its mean for all, or 1."""
    if kind == "off" or scores.trust is None:
        return torch.ones(len(scores.value))
    return scores.trust.mean().expand(len(scores.trust)) if kind == "constant" else scores.trust


@torch.no_grad()
def check_replay(policy, pipe: Pipeline, trajectory: Trajectory, condition: Condition, cfg: RLConfig) -> None:
    """Before any update the replayed probabilities must be those of the rollout: every ratio is 1."""
    n, samples = trajectory.latents[0, 0].numel(), torch.arange(min(len(condition), cfg.micro_batch))
    for step in trajectory.scored.nonzero()[:, 0]:
        steps = step.expand(len(samples))
        log_prob, _, _ = replay(policy, pipe.schedule, trajectory, condition, samples, steps, eta=cfg.eta)
        worst = float(n * (log_prob - trajectory.log_probs[samples, steps]).abs().max())
        if not worst <= max(0.01 * cfg.clip_range, ROUNDING):
            raise ValueError(f"replay differs from the rollout by {worst:.2g} nats before any update")


def gold_scores(images: Tensor, prompts: Prompts) -> Tensor | None:
    """The true preference (B,), logged and never trained on; None where nobody knows it: pictures of your own."""
    if prompts.truth is not None:  # the toy's raters know it
        return toy_raters.gold_scores(images, prompts)
    return None


def training_row(scores: Scores, gamma: Tensor, log: dict[str, list], n: int) -> dict[str, float]:
    """What an epoch of training says in metrics.jsonl (tutorials/REFERENCE.md explains each key)."""
    log_ratio = n * torch.cat(log["ratio"]).cpu().double().log()  # joint, in nats
    row = {
        "reward": float(scores.value.mean()),
        "reward_std": float(scores.value.std()),
        "loss": sum(log["loss"]),
        "log_ratio_min": float(log_ratio.min()),
        "log_ratio_max": float(log_ratio.max()),
        "clip_fraction": float(torch.cat(log["clipped"]).float().mean()),
        "grad_norm": sum(log["grad_norm"]) / len(log["grad_norm"]),
        **metrics.quantiles(gamma, "gamma"),
    }
    row |= {"kl": float(torch.cat(log["kl"]).mean())} if log["kl"] else {}
    return row | (metrics.quantiles(scores.parts["norm"], "norm") if "norm" in scores.parts else {})


def evaluation_row(scores: Scores, gold: Tensor | None) -> dict[str, float]:
    """What an evaluation says in metrics.jsonl."""
    row = {"eval_reward": float(scores.value.mean())}
    row |= {} if gold is None else {"eval_gold": float(gold.mean())}
    row |= metrics.quantiles(scores.parts["norm"], "eval_norm") if "norm" in scores.parts else {}
    return row | {f"eval_{k}": float(scores.parts[k].mean()) for k in ("trusted", "bound") if k in scores.parts}


# ------------------------------------------------------------------------------------------------ after the loop


def comparison(completions: dict[str, Tensor], prompts: Prompts, reward: CheckedReward) -> dict:
    """Reward, gold and WinRate of the aligned model against the base, on one completion of each a prompt."""
    before, after = (reward(completions[k], prompts).value for k in ("base", "aligned"))
    gold = [gold_scores(completions[k], prompts) for k in ("base", "aligned")]
    judged_before, judged_after = (g if g is not None else v for g, v in zip(gold, (before, after)))
    win_rate = metrics.win_rate(judged_after[:, None], judged_before)
    return {
        "reward_before": float(before.mean()),
        "reward_after": float(after.mean()),
        **{f"gold_{k}": None if g is None else float(g.mean()) for k, g in zip(("before", "after"), gold)},
        "win_rate": win_rate,
        "win_rate_ci": metrics.wilson_interval(win_rate, len(prompts)),
        "judge": "reward" if gold[0] is None else "gold",
        "win_rate_reward": metrics.win_rate(after[:, None], before),
    }


def conclusion(summary: dict, count: int) -> str:
    """The comparison in one sentence."""
    by_gold = f", {summary['win_rate']:.3f} by gold, the toy raters' preference" if summary["judge"] == "gold" else ""
    return (
        f"on {count} further prompts the reward went from {summary['reward_before']:.3f} to "
        f"{summary['reward_after']:.3f}; WinRate {summary['win_rate_reward']:.3f} by it{by_gold}"
    )


if __name__ == "__main__":
    run_main(SCRIPT, main)
