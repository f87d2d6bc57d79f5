"""`python -m minipref bench`: what each fused kernel and each saving of the loop is worth on this machine, as Markdown.

Two tables. Kernels (on a CUDA device with Triton): PyTorch's own operations, `torch.compile` and the fused kernel at
the sizes of three UNets, forward and backward, beside the bandwidth of a plain copy measured in the same run. The loop
(anywhere): one RL iteration against the wasteful form that PrefPaint's released code has, each saving alone and all
together, from the same weights and noise, with the largest difference of latents, log-probabilities and gradients.
"""

from __future__ import annotations

import copy
import platform
import shlex
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .bench_kernels import SD_INPAINTING, kernel_table
from .data.prompts import scene_prompts
from .diffusion import Condition, Schedule, ScheduleConfig, ddim_step, predict
from .kernels import common
from .losses import clipped_surrogate
from .models.unet import UNet
from .pipeline import Pipeline, pick_device
from .runtime.config import opt, parse


@dataclass(frozen=True)
class BenchConfig:
    device: str = opt("cpu", "cpu, cuda or mps")
    out: str = opt("", "Markdown file to write; empty: print only")
    part: str = opt("all", "kernels, loop or all", choices=("kernels", "loop", "all"))
    size: str = opt(
        "small", "UNet of the loop: small, or sd (Stable Diffusion 1.5, random weights)", choices=("small", "sd")
    )
    batch: int = opt(16, "pictures an iteration", lo=1)
    steps: int = opt(10, "T, DDIM steps of a rollout (PrefPaint: 50)", lo=2)
    train_steps: int = opt(3, "K, steps that are trained (PrefPaint: 5 windows)", lo=1)
    rounds: int = opt(5, "how often every form is timed, in turn", lo=1)
    seed: int = opt(0, "seed of weights and noise", lo=0)
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0, hi=1024)


@dataclass(frozen=True)
class Savings:
    """What the released loop wastes, and this one saves."""

    one_branch: bool = True  # both guidance branches have the same prompt: one call of the UNet is exactly the same
    keep_activations: bool = True  # no gradient checkpointing where memory allows
    no_waiting: bool = True  # nothing is read back from the device inside the loops


@dataclass(frozen=True)
class Outcome:
    """What an iteration computes (latents, log-probabilities, gradients before they are clipped) and its seconds."""

    results: list[Tensor]  # latents, log-probabilities, all gradients in one vector
    rollout: float
    update: float

    def difference(self, other: Outcome) -> float:
        """Largest difference of any entry, as a share of the largest entry of its tensor."""
        pairs = zip(self.results, other.results)
        return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def iteration(
    policy: nn.Module,
    schedule: Schedule,
    condition: Condition,
    noise: Tensor,
    saved: Savings,
    *,
    steps: int,
    train_steps: int,
    guidance: float = 3.0,
) -> Outcome:
    """One RL iteration: rollout of T steps, a stand-in for the reward, K trained steps, one update.

    noise (B, T+1, C, H, W). Changes the weights of `policy` in place.
    """
    device, read_back, B = noise.device, 0.0, len(noise)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-5, fused=True)
    condition = replace(condition, empty=None)

    def output(x_t: Tensor, times: Tensor) -> Tensor:
        if saved.one_branch:
            return policy(condition.unet_input(x_t), times, condition.context)
        x = condition.unet_input(x_t)
        both = policy(torch.cat([x, x]), torch.cat([times, times]), torch.cat([condition.context] * 2))
        without, with_text = both.chunk(2)
        return without + guidance * (with_text - without)

    started = now(device)
    timesteps = schedule.timesteps(steps)
    following = torch.cat([timesteps[1:], timesteps.new_tensor([-1])])
    coefficients = schedule.coefficients(timesteps, following, 1.0)
    scored = coefficients[2] > 0
    tables = [v.float().to(device)[:, None].expand(-1, B) for v in coefficients]
    on_device = timesteps.to(device)[:, None].expand(-1, B)
    latents, log_probs = [noise[:, 0]], []
    with torch.no_grad():
        for i, (t, t_prev) in enumerate(zip(timesteps.tolist(), following.tolist())):
            known = tables[0][i], tables[1][i], tables[2][i]
            out = output(latents[-1], on_device[i])
            x_prev, log_prob = ddim_step(
                schedule, out, latents[-1], t, t_prev, eta=1.0, noise=noise[:, i + 1], coefficients=known
            )
            latents.append(x_prev)
            log_probs.append(log_prob)
            if not saved.no_waiting:
                read_back += float(x_prev.mean()) + float(log_prob.mean())
    rolled = now(device)

    advantage = F.normalize(latents[-1].float().flatten(1).mean(1) - latents[-1].float().mean(), dim=0) * B**0.5
    n = latents[0][0].numel()
    chosen = scored.nonzero()[:, 0][:train_steps].tolist()
    for i in chosen:
        t, t_prev = int(timesteps[i]), int(following[i])
        times, known = on_device[i], (tables[0][i], tables[1][i], tables[2][i])
        if saved.keep_activations:
            out = output(latents[i], times)
        else:
            out = checkpoint(output, latents[i], times, use_reentrant=False)
        _, log_prob = ddim_step(
            schedule, out, latents[i], t, t_prev, eta=1.0, x_prev=latents[i + 1], coefficients=known
        )
        loss = clipped_surrogate(log_prob, log_probs[i], advantage, clip_range=1.0, n=n)[0]
        (loss / len(chosen)).backward()
        if not saved.no_waiting:
            read_back += loss.item()
    gradients = torch.cat([p.grad.detach().float().flatten() for p in policy.parameters() if p.grad is not None])
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimiser.step()
    results = [latents[-1].float(), torch.stack(log_probs, 1)[:, scored].float(), gradients]
    return Outcome(results, rolled - started, now(device) - rolled)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def loop_setting(cfg: BenchConfig, device: torch.device):
    """-> a UNet, its schedule, an encoded condition, and the noise of one iteration."""
    torch.manual_seed(cfg.seed)
    if cfg.size == "small":
        pipe = Pipeline.load(None, cfg.device)
        prompts = scene_prompts(cfg.seed, 0, cfg.batch)
        shape = pipe.latent_shape(prompts)
        unet, schedule, condition, dtype = pipe.unet, pipe.schedule, pipe.condition(prompts), torch.float32
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        unet = UNet(SD_INPAINTING).to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        schedule, shape = Schedule(ScheduleConfig()), (4, 64, 64)
        context = torch.randn(cfg.batch, 77, 768, device=device, dtype=dtype)
        mask, masked = (torch.randn(cfg.batch, c, 64, 64, device=device, dtype=dtype) for c in (1, 4))
        condition = Condition(context, mask, masked)
    noise = torch.randn(cfg.batch, cfg.steps + 1, *shape).to(device, dtype)
    return unet.requires_grad_(True), schedule, condition, noise


def loop_table(cfg: BenchConfig, device: torch.device) -> str:
    """The wasteful iteration, each saving alone, and all of them, timed in turn from the same weights."""
    unet, schedule, condition, noise = loop_setting(cfg, device)
    start = copy.deepcopy(unet.state_dict())
    names = [f.name for f in fields(Savings)]
    nothing = Savings(**dict.fromkeys(names, False))
    forms = {"wasteful": nothing, **{n: replace(nothing, **{n: True}) for n in names}, "all": Savings()}
    found: dict[str, list[Outcome]] = {k: [] for k in forms}
    for _ in range(cfg.rounds + 1):  # the first warms up
        for name, saved in forms.items():
            unet.load_state_dict(start)
            unet.zero_grad()
            one = iteration(unet, schedule, condition, noise, saved, steps=cfg.steps, train_steps=cfg.train_steps)
            found[name].append(replace(one, results=[]) if found[name] else one)  # the first keeps its results
    lines = [
        f"One iteration of {cfg.batch} pictures, {cfg.steps} steps, {cfg.train_steps} trained, UNet {cfg.size!r}; "
        f"medians of {cfg.rounds} rounds in turn, and of a round's ratios. Difference: largest of latents, "
        "log-probabilities and gradients from the wasteful form's, as a share of the largest entry of each.",
        "",
        "| form | s | rollout, pictures/s | update, pictures/s | times the wasteful form | difference |",
        "|---|---|---|---|---|---|",
    ]
    for name, every in found.items():
        seconds, slow = ([o.rollout + o.update for o in f[1:]] for f in (every, found["wasteful"]))
        rates = [cfg.batch / median([getattr(o, k) for o in every[1:]]) for k in ("rollout", "update")]
        lines.append(
            f"| {name.replace('_', ' ')} | {median(seconds):.3f} | {rates[0]:.1f} | {rates[1]:.1f} | "
            f"{median([a / b for a, b in zip(slow, seconds)]):.2f} | {every[0].difference(found['wasteful'][0]):.1e} |"
        )
    return "\n".join(lines)


def rival_line(cfg: BenchConfig, device: torch.device) -> str:
    """The same sampling loop with diffusers' UNet of the same weights, in turn."""
    try:
        from diffusers import UNet2DConditionModel  # type: ignore[import-not-found]
    except ImportError:
        return "diffusers is not installed: no comparison with its UNet (pip install '.[parity]')."
    unet, schedule, condition, noise = loop_setting(replace(cfg, size="small"), device)
    c = unet.config
    theirs: Any = UNet2DConditionModel(**{f.name: getattr(c, f.name) for f in fields(c)})
    theirs.to(device).eval()
    theirs.load_state_dict(unet.state_dict())
    theirs.to(memory_format=torch.channels_last)

    class Wrapped(nn.Module):
        def forward(self, x, t, context):
            return theirs(x, t, encoder_hidden_states=context, return_dict=False)[0]

    timesteps = schedule.timesteps(cfg.steps).tolist()

    def loop(model) -> Tensor:
        x = noise[:, 0]
        with torch.no_grad():
            for i, (t, t_prev) in enumerate(zip(timesteps, timesteps[1:] + [-1])):
                out = predict(model, x, t, replace(condition, empty=None))
                x = ddim_step(schedule, out, x, t, t_prev, eta=1.0, noise=noise[:, i + 1])[0]
        return x

    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for round_ in range(cfg.rounds + 1):
        for name, model in (("ours", unet), ("theirs", Wrapped())):
            begun = now(device)
            x = loop(model)
            if round_:
                times[name].append(now(device) - begun)
            if name == "ours":
                kept = x
    ratio = median([b / a for a, b in zip(times["ours"], times["theirs"])])
    return (
        f"The sampling loop is {ratio:.2f} times as fast with our UNet as with diffusers' on the same weights (largest "
        f"difference of the latents {float((kept - x).abs().max()):.1e})."
    )


def median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


def machine(device: torch.device) -> str:
    import numpy

    parts = [f"Python {platform.python_version()}", f"torch {torch.__version__}", f"numpy {numpy.__version__}"]
    parts += [f"triton {common.triton.__version__}"] if common.triton else []
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )
    return f"{name}; {', '.join(parts)}"


def main(argv: list[str] | None = None) -> None:
    cfg = parse(BenchConfig, argv, prog="minipref bench", description=__doc__ or "")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = pick_device(cfg.device)
    command = shlex.join(argv if argv is not None else sys.argv[2:])
    text = [f"`python -m minipref bench {command}`  ", machine(device), ""]
    if cfg.part != "loop":
        fits = device.type == "cuda" and common.triton is not None
        table = kernel_table(device) if fits else "No CUDA device with Triton: kernels are not timed."
        text += ["## Kernels", "", table, ""]
    if cfg.part != "kernels":
        text += ["## The loop", "", loop_table(cfg, device), ""]
        if cfg.size == "small":
            text += [rival_line(cfg, device), ""]
    print("\n".join(text))
    if cfg.out:
        Path(cfg.out).write_text("\n".join(text), encoding="utf-8")
