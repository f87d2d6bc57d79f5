"""Aligns an inpainting diffusion model with a preference by reinforcement learning (PrefPaint; DDPO).

    python train_rl.py --small

Each epoch: complete a few prompts several times, score the completions, and make the better ones of each prompt more
probable, each sample weighted by how far its reward can be trusted. The whole algorithm stands in `main`.
"""

from __future__ import annotations

import copy
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minipref import metrics
from minipref.data.annotator import gold
from minipref.data.folders import read_folder, split_pictures
from minipref.data.prompts import picture_prompts, scene_prompts
from minipref.data.scenes import HELD_OUT_WORLD, RL_WORLD, SIZE, world
from minipref.diffusion import Condition, Trajectory, predict, score_step
from minipref.evaluate import path_kl
from minipref.guard import Guard
from minipref.losses import advantages, clipped_surrogate, gaussian_kl
from minipref.named_rewards import CheckedReward, load_reward
from minipref.pipeline import Pipeline, Sampling, learned_reward
from minipref.report import rl_curves, rl_grid
from minipref.runtime import checkpoint
from minipref.runtime.config import opt, parse, run_main
from minipref.runtime.runlog import RunFolder, peak_memory_mb, progress


@dataclass(frozen=True)
class RLConfig:
    # what is aligned, with what
    weights: str = opt("", "folder with unet.pt, clip.pt, reward.pt; empty: the shipped small ones")
    data: str = opt("", "folder of your own pictures as prompts; empty: toy scenes")
    reward: str = opt("model", "model, model:RUN, clip:TEXT, brightness, jpeg_size, gold, a*x+b*y, or module:function")
    out: str = opt("", "run folder; empty: runs/rl-small, or the next free name")
    seed: int = opt(0, "seed of prompts, noise and order", lo=0, hi=999_999)
    # rollouts
    epochs: int = opt(40, "rounds of rollout and update", lo=1)
    prompts: int = opt(16, "prompts an epoch", lo=1)
    samples: int = opt(4, "completions a prompt: its group", lo=1)
    steps: int = opt(6, "T, DDIM steps of a rollout (PrefPaint: 50)", lo=2)
    eta: float = opt(1.0, "noise of the DDIM steps, 1 = DDPM; 0 has no probability (PrefPaint: 1)", lo=0, hi=1)
    # updates
    train_steps: int = opt(5, "K, random steps trained of each rollout's random ones (PrefPaint: 5 of 50)", lo=1)
    updates: int = opt(2, "optimiser steps a rollout, each on its share of the samples", lo=1)
    lr: float = opt(1e-4, "learning rate of AdamW (PrefPaint: 2e-6)", lo=0)
    weight_decay: float = opt(0.01, "weight decay of AdamW (PrefPaint: 0.01)", lo=0)
    grad_clip: float = opt(1.0, "largest gradient norm", lo=1e-6)
    clip_range: float = opt(
        1.64, "clip of the joint log-ratio (PrefPaint: 1e-4 of the mean's, at n = 16,384: 1.64)", lo=0.01
    )
    trust: str = opt(
        "exponential",
        "weight of samples where the reward gives a gamma (PrefPaint Eq. 12); constant: its mean; off: 1",
        choices=("exponential", "constant", "off"),
    )
    # A little KL keeps the policy from drifting where the reward is blind (tutorials/LOG.md).
    kl_weight: float = opt(0.03, "kappa of the KL to the base, per dimension (PrefPaint Eq. 1; its code: 0)", lo=0)
    guard: float = opt(
        0.5, "stop where the trusted share fell below this part, or certainty is lost; 0: never", lo=0, hi=1
    )
    ema: float = opt(0.9, "decay per update of the averaged weights, which are evaluated and kept", lo=0, hi=0.9999)
    micro_batch: int = opt(64, "steps a backward pass: less memory, the same gradient", lo=1)
    # what is looked at
    eval_every: int = opt(5, "epochs between evaluations", lo=1)
    eval_prompts: int = opt(64, "fixed held-out prompts of the curves", lo=8)
    win_prompts: int = opt(256, "held-out prompts of the final WinRate", lo=8)
    held_out: int = opt(0, "which held-out prompts", lo=0, hi=999_999)
    device: str = opt("cpu", "cpu, cuda or mps")
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0, hi=1024)


PRESETS: dict[str, dict] = {"small": {}}
ROUNDING = 0.005  # nats by which sums over a whole picture may differ from batch to batch
CURVES, WIN_BASE, WIN_ALIGNED = -1, -2, -3  # "epochs" whose noise the evaluations draw


def prompt_sources(cfg: RLConfig):
    """Two functions (start, count) -> Prompts: for training, and held out."""
    if not cfg.data:
        return (
            lambda start, count: scene_prompts(world(RL_WORLD, cfg.seed), start, count),
            lambda start, count: scene_prompts(world(HELD_OUT_WORLD, cfg.held_out), start, count),
        )
    images, _, skipped = read_folder(cfg.data, SIZE)
    for line in skipped:
        print(f"skipped {line}")
    rest, held = split_pictures(images)
    print(f"{len(images)} pictures from {cfg.data} ({len(skipped)} skipped): {len(rest)} train, {len(held)} held out")
    if len(rest) == len(images):
        print("fewer than ten pictures: the same serve for both, so that held-out figures say little about others")
    return (
        lambda start, count: picture_prompts(rest, world(RL_WORLD, cfg.seed), start, count),
        lambda start, count: picture_prompts(held, world(HELD_OUT_WORLD, cfg.held_out), start, count),
    )


def main() -> None:
    cfg = parse(RLConfig, None, prog="train_rl.py", description=__doc__ or "", presets=PRESETS)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    started = time.time()
    pipe = Pipeline.load(cfg.weights, cfg.device)
    named = load_reward(cfg.reward, lambda: learned_reward(cfg.weights), lambda: (pipe.clip, pipe.tokenizer))
    reward = CheckedReward(cfg.reward, named)
    if cfg.eta < 0.05:
        raise ValueError(f"--eta {cfg.eta}: the steps are deterministic and have no probability to raise; choose 1")
    if cfg.prompts * cfg.samples == 1:
        raise ValueError("--prompts 1 --samples 1: a single completion is neither better nor worse than another")
    if cfg.updates > cfg.prompts * cfg.samples:
        raise ValueError(f"--updates {cfg.updates}: more than the {cfg.prompts * cfg.samples} completions of an epoch")
    training_prompts, held_out_prompts = prompt_sources(cfg)
    held_out = held_out_prompts(0, cfg.eval_prompts)
    how = Sampling(cfg.steps, cfg.eta)
    before = pipe.complete(pipe.unet, held_out, how, seed=cfg.seed, epoch=CURVES)
    reward(before, held_out)  # a reward that cannot be used is refused before anything is written
    run = RunFolder(cfg.out, "runs/rl-small", asdict(cfg) | whole_paths(cfg))

    base, policy = pipe.unet.requires_grad_(False), copy.deepcopy(pipe.unet).requires_grad_(True)
    average = copy.deepcopy(policy).requires_grad_(False)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    order = np.random.default_rng([cfg.seed, 1])

    def look(epoch: int) -> dict:
        """Reward and gold of the averaged policy on the fixed held-out prompts, with noise that never changes."""
        images = pipe.complete(average, held_out, how, seed=cfg.seed, epoch=CURVES)
        scores = reward(images, held_out)
        rl_grid(run.path / "samples" / f"{epoch:06d}.png", held_out, before, images, epoch)
        row = {"eval_reward": float(scores.value.mean())}
        if held_out.scenes:  # the true preference is looked at, never trained on
            row["eval_gold"] = float(gold(images, held_out.masks, held_out.scenes).label.mean())
        if "norm" in scores.parts:
            row |= metrics.quantiles(scores.parts["norm"], "eval_norm")
        row |= {f"eval_{k}": float(scores.parts[k].mean()) for k in ("trusted", "bound") if k in scores.parts}
        return row

    def step_of(unet, path: Trajectory, condition: Condition, samples: Tensor, steps: Tensor):
        """Mean, sigma and log-probability that `unet` gives to steps of a rollout: samples (M,), steps (M,)."""
        t, t_prev = (x[steps] for x in step_times(path.timesteps))
        x_t, x_prev = path.latents[samples, steps], path.latents[samples, steps + 1]
        output = predict(unet, x_t, t, condition[samples])
        return score_step(pipe.schedule, output, x_t, x_prev, t, t_prev, eta=cfg.eta)

    first = look(0)
    guard, stopped, kept = Guard(cfg.guard), None, copy.deepcopy(average.state_dict())
    guard.start(first["eval_reward"], first.get("eval_trusted"), first.get("eval_bound"))
    meta = {"schedule": asdict(pipe.schedule.config), "base": pipe.fingerprint, "epoch": 0}
    checkpoint.save(run.path / "best.pt", "unet", average.config, kept, meta=meta)
    run.log(epoch=0, **first, seconds=time.time() - started)
    print(f"{run.path}: reward {first['eval_reward']:.3f} before, on {len(held_out)} held-out prompts to watch")

    bar = progress(range(1, cfg.epochs + 1), "RL")
    for epoch in bar:
        # 1. Roll out: every prompt `samples` times, each step's Gaussian log-probability kept (PrefPaint Eq. 2).
        B = cfg.prompts * cfg.samples
        prompts = training_prompts((epoch - 1) * cfg.prompts, cfg.prompts).repeat_each(cfg.samples)
        groups = torch.arange(cfg.prompts).repeat_interleave(cfg.samples)
        condition = pipe.condition(prompts)
        path = pipe.sample(policy, prompts, how, cfg.seed, epoch, range(B), condition)
        n = path.latents[0, 0].numel()

        # 2. Score: reward, trust weight, advantage within each prompt's group.
        images = pipe.decode(path, prompts)
        scores = reward(images, prompts)
        advantage = advantages(scores.value, groups).to(pipe.device)
        gamma = torch.ones(B) if cfg.trust == "off" or scores.trust is None else scores.trust
        gamma = (gamma.mean().expand(B) if cfg.trust == "constant" else gamma).to(pipe.device)

        random_steps = path.scored.nonzero()[:, 0]
        if epoch == 1:  # before any update the replayed probabilities must be those of the rollout
            with torch.no_grad():
                rows = torch.arange(min(B, cfg.micro_batch))
                for at in (i.expand(len(rows)) for i in random_steps):
                    _, _, replayed = step_of(policy, path, condition, rows, at)
                    worst = float(n * (replayed - path.log_probs[rows, at]).abs().max())
                    if not worst <= max(0.01 * cfg.clip_range, ROUNDING):
                        raise ValueError(f"replay differs from the rollout by {worst:.2g} nats before any update")

        # 3. Update: K random steps of each sample, several optimiser steps on disjoint samples.
        K = min(cfg.train_steps, len(random_steps))
        ratios, silenced, grad_norms, losses = [], [], [], []
        for part in torch.from_numpy(order.permutation(B)).tensor_split(cfg.updates):
            steps = torch.stack([random_steps[order.permutation(len(random_steps))[:K]] for _ in part])  # (M, K)
            pairs = torch.stack([part[:, None].expand_as(steps), steps], -1).flatten(0, 1)  # (M·K, 2)
            for s, i in (chunk.T for chunk in pairs.split(cfg.micro_batch)):
                mean, sigma, log_prob = step_of(policy, path, condition, s, i)
                loss, ratio, clipped = clipped_surrogate(
                    log_prob, path.log_probs[s, i], advantage[s], clip_range=cfg.clip_range, n=n, gamma=gamma[s]
                )
                if cfg.kl_weight > 0:
                    with torch.no_grad():
                        mean_base, _, _ = step_of(base, path, condition, s, i)
                    loss = loss + cfg.kl_weight * gaussian_kl(mean, mean_base, sigma).mean() / n
                (loss * len(s) / len(pairs)).backward()
                ratios.append(ratio)
                silenced.append(clipped)
                losses.append(loss.item() * len(s) / len(pairs))
            grad_norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)))
            optimiser.step()
            optimiser.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(policy.parameters()), 1 - cfg.ema)

        # 4. Log. KL to the base model in nats, summed over dimensions and scored steps, on one sample a prompt.
        with torch.no_grad():
            rows, kl = torch.arange(0, B, cfg.samples), torch.zeros(cfg.prompts)
            for i in random_steps:
                at = i.expand(len(rows))
                mean, sigma, _ = step_of(policy, path, condition, rows, at)
                kl += gaussian_kl(mean, step_of(base, path, condition, rows, at)[0], sigma).cpu()
        joint = n * torch.cat(ratios).cpu().double().log()
        row = {
            "reward": float(scores.value.mean()),
            "reward_std": float(scores.value.std()),
            "within_prompt_std": metrics.within_prompt_std(scores.value, groups),
            "loss": sum(losses) / len(grad_norms),
            "log_ratio_min": float(joint.min()),
            "log_ratio_max": float(joint.max()),
            "clip_fraction": float(torch.cat(silenced).float().mean()),
            "grad_norm": sum(grad_norms) / len(grad_norms),
            "kl": float(kl.mean()),
            "diversity": metrics.diversity(images, prompts.masks, groups),
            **metrics.quantiles(gamma.cpu(), "gamma"),
        }
        if "norm" in scores.parts:
            row |= metrics.quantiles(scores.parts["norm"], "norm")
        if epoch % cfg.eval_every == 0 or epoch == cfg.epochs:
            row |= look(epoch)
            meta["epoch"] = epoch
            keep, stop = guard.look(row["eval_reward"], row.get("eval_trusted"), row.get("eval_bound"))
            for name in ["last.pt"] + (["best.pt"] if keep else []):
                checkpoint.save(run.path / name, "unet", average.config, average.state_dict(), meta=meta)
            kept = copy.deepcopy(average.state_dict()) if keep else kept
            stopped = epoch if stop else None
            row |= {"stopped": True} if stop else {}
        run.log(epoch=epoch, **row, seconds=time.time() - started)
        rl_curves(run)
        shown = {"reward": f"{row['reward']:.2f}", "kl": f"{row['kl']:.1f}", "clipped": f"{row['clip_fraction']:.0%}"}
        bar.set_postfix(shown | ({"gold": f"{row['eval_gold']:.2f}"} if "eval_gold" in row else {}), refresh=False)

        if stopped:
            average.load_state_dict(kept)
            print(f"stopped after epoch {stopped}: more reward, but less of it certain; best.pt counts")
            break

    # 5. The final comparison: other held-out prompts, independent noise for the two models.
    judged = held_out_prompts(cfg.eval_prompts, cfg.win_prompts)
    pictures = [
        pipe.complete(u, judged, how, seed=cfg.seed, epoch=e) for u, e in ((base, WIN_BASE), (average, WIN_ALIGNED))
    ]
    values = [reward(x, judged).value for x in pictures]
    true = [gold(x, judged.masks, judged.scenes).label for x in pictures] if judged.scenes else None
    old, new = true or values
    wins = metrics.win_rate(new[:, None], old)
    summary = {
        "reward_before": float(values[0].mean()),
        "reward_after": float(values[1].mean()),
        "gold_before": float(true[0].mean()) if true else None,
        "gold_after": float(true[1].mean()) if true else None,
        "win_rate": wins,
        "win_rate_ci": metrics.wilson_interval(wins, len(judged)),
        "judge": "gold" if true else "reward",
        "win_rate_reward": metrics.win_rate(values[1][:, None], values[0]),
        "kl": float(path_kl(pipe, average, judged.select(slice(0, 64)), how, cfg.seed).mean()),
        "stopped": stopped,
        "judged": "best" if stopped else "last",
        "seconds": time.time() - started,
        "peak_memory_mb": peak_memory_mb(),
        "seed": cfg.seed,
    }
    run.write_json("summary.json", summary)
    print(
        f"{run.path}: on {len(judged)} further prompts the reward went from {summary['reward_before']:.3f} to "
        f"{summary['reward_after']:.3f}; WinRate {summary['win_rate_reward']:.3f} by it"
        + (f", {wins:.3f} by gold, the toy raters' preference" if true else "")
    )
    print(f"look at {run.path / 'samples'} and {run.path / 'curves.png'}")


def whole_paths(cfg: RLConfig) -> dict[str, str]:
    """Folders as absolute paths: a run is read from other folders than it was started in."""
    reward = re.sub(r"(?<![\w.])model:([^+]+)", lambda m: f"model:{Path(m[1].strip()).resolve()}", cfg.reward)
    return {"reward": reward} | {
        k: str(Path(v).resolve()) for k, v in vars(cfg).items() if k in ("weights", "data") and v
    }


def step_times(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """t and t_prev of every sampling step, (T,) each."""
    return timesteps, torch.cat([timesteps[1:], timesteps.new_tensor([-1])])


if __name__ == "__main__":
    run_main("train_rl.py", main)
