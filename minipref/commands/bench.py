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
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..diffusion import Condition, Schedule, ScheduleConfig, replay, rollout
from ..kernels import common
from ..losses import clipped_surrogate
from ..models.unet import UNet
from ..pipeline import Pipeline, pick_device
from ..presets import SD15_INPAINT_UNET
from ..runs import RENAMED
from ..runtime.checkpoint import check_place, write_text
from ..runtime.config import opt, parse
from ..toy.world import scene_prompts
from .bench_kernels import kernel_table
from .bench_lean import epoch_table


@dataclass(frozen=True)
class BenchConfig:
    device: str = opt("cpu", "cpu, cuda or mps")
    out: str = opt("", "Markdown file to write; empty: print only")
    part: str = opt(
        "all",
        "kernels, loop, all (both), or epoch: train_rl.py against a lean loop on diffusers' UNet",
        choices=("kernels", "loop", "epoch", "all"),
    )
    size: str = opt(
        "small", "UNet of the loop: small, or sd (Stable Diffusion 1.5, random weights)", choices=("small", "sd")
    )
    batch_size: int = opt(16, "pictures an iteration", lo=1, hi=10_000)
    sampling_steps: int = opt(10, "T, DDIM steps of a rollout (PrefPaint: 50)", lo=2, hi=1000)
    train_steps: int = opt(3, "K, steps that are trained (PrefPaint: 5 windows)", lo=1)
    rounds: int = opt(5, "how often every form is timed, in turn", lo=1, hi=10_000)
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


def wasteful(unet: nn.Module, saved: Savings, guidance: float = 3.0) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The UNet as the loop calls it, with the waste that is not saved: the loop itself stays what it is."""

    def call(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        if saved.one_branch:
            return unet(x, t, context)
        without, with_text = unet(*(torch.cat([v, v]) for v in (x, t, context))).chunk(2)
        return without + guidance * (with_text - without)

    def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        training = torch.is_grad_enabled() and not saved.keep_activations
        output = checkpoint(call, x, t, context, use_reentrant=False) if training else call(x, t, context)
        if not saved.no_waiting:
            output.detach().mean().item()
        return output

    return predict


def iteration(
    policy: nn.Module,
    schedule: Schedule,
    condition: Condition,
    shape: tuple[int, int, int],
    saved: Savings,
    *,
    steps: int,
    train_steps: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Outcome:
    """One RL iteration of the loop's own functions: rollout of T steps, a stand-in for the reward, K trained steps, one
    update. Changes the weights of `policy` in place."""
    device, B, unet = condition.context.device, len(condition), wasteful(policy, saved)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-5, fused=True)
    condition = replace(condition, empty=None)
    started = now(device)
    trajectory = rollout(
        unet,
        schedule,
        condition,
        shape=shape,
        steps=steps,
        generator=torch.Generator().manual_seed(seed),
        dtype=dtype,
    )
    rolled = now(device)
    last, n = trajectory.latents[:, -1].float(), trajectory.latents[0, 0].numel()
    advantage = F.normalize(last.flatten(1).mean(1) - last.mean(), dim=0) * B**0.5
    scored, samples = trajectory.scored.nonzero()[:, 0], torch.arange(B)
    chosen = scored[:train_steps]
    for step in chosen:
        log_prob, _, _ = replay(unet, schedule, trajectory, condition, samples, step.expand(B), eta=1.0)
        loss, _, _ = clipped_surrogate(log_prob, trajectory.log_probs[:, step], advantage, clip_range=1.0, n=n)
        (loss / len(chosen)).backward()
    gradients = torch.cat([p.grad.detach().float().flatten() for p in policy.parameters() if p.grad is not None])
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimiser.step()
    results = [last, trajectory.log_probs[:, scored].float(), gradients]
    return Outcome(results, rolled - started, now(device) - rolled)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def loop_setting(cfg: BenchConfig, device: torch.device) -> dict[str, Any]:
    """What `iteration` needs: a UNet as `policy`, schedule, encoded condition, shape and dtype of the latents."""
    torch.manual_seed(cfg.seed)
    steps = {"steps": cfg.sampling_steps, "train_steps": cfg.train_steps, "seed": cfg.seed}
    if cfg.size == "small":
        pipe = Pipeline.load(None, cfg.device)
        prompts = scene_prompts(cfg.seed, 0, cfg.batch_size)
        unet, condition, shape = pipe.unet.requires_grad_(True), pipe.condition(prompts), pipe.latent_shape(prompts)
        return steps | {"policy": unet, "schedule": pipe.schedule, "condition": condition, "shape": shape}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    unet = UNet(SD15_INPAINT_UNET).to(device, dtype)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    context = torch.randn(cfg.batch_size, 77, 768, device=device, dtype=dtype)
    mask, masked = (torch.randn(cfg.batch_size, c, 64, 64, device=device, dtype=dtype) for c in (1, 4))
    condition = Condition(context, mask, masked)
    parts = {"policy": unet, "schedule": Schedule(ScheduleConfig()), "condition": condition, "shape": (4, 64, 64)}
    return steps | parts | {"dtype": dtype}


def loop_table(cfg: BenchConfig, device: torch.device) -> str:
    """The wasteful iteration, each saving alone, and all of them, timed in turn from the same weights."""
    setting = loop_setting(cfg, device)
    start = copy.deepcopy(setting["policy"].state_dict())
    names = [f.name for f in fields(Savings)]
    nothing = Savings(**dict.fromkeys(names, False))
    forms = {"wasteful": nothing, **{n: replace(nothing, **{n: True}) for n in names}, "all": Savings()}
    timed: dict[str, list[Outcome]] = {k: [] for k in forms}
    for _ in range(cfg.rounds + 1):  # the first warms up
        for name, saved in forms.items():
            setting["policy"].load_state_dict(start)
            setting["policy"].zero_grad()
            one = iteration(**setting, saved=saved)
            timed[name].append(replace(one, results=[]) if timed[name] else one)  # the first keeps its results
    lines = [
        f"One iteration of {cfg.batch_size} pictures, {cfg.sampling_steps} steps, {cfg.train_steps} trained, UNet "
        f"{cfg.size!r}; medians of {cfg.rounds} rounds in turn, and of a round's ratios. Difference: largest of "
        "latents, log-probabilities and gradients from the wasteful form's, as a share of the largest entry of each.",
        "",
        "| form | s | rollout, pictures/s | update, pictures/s | times the wasteful form | difference |",
        "|---|---|---|---|---|---|",
    ]
    for name, every in timed.items():
        seconds, slow = ([o.rollout + o.update for o in f[1:]] for f in (every, timed["wasteful"]))
        rates = [cfg.batch_size / median([getattr(o, k) for o in every[1:]]) for k in ("rollout", "update")]
        lines.append(
            f"| {name.replace('_', ' ')} | {median(seconds):.3f} | {rates[0]:.1f} | {rates[1]:.1f} | "
            f"{median([a / b for a, b in zip(slow, seconds)]):.2f} | {every[0].difference(timed['wasteful'][0]):.1e} |"
        )
    return "\n".join(lines)


def rival_line(cfg: BenchConfig, device: torch.device) -> str:
    """The same sampling loop with diffusers' UNet of the same weights, in turn."""
    try:
        from diffusers import UNet2DConditionModel  # type: ignore[import-not-found]
    except ImportError:
        return "diffusers is not installed: no comparison with its UNet (pip install '.[parity]')."
    setting = loop_setting(replace(cfg, size="small"), device)
    unet, c = setting["policy"], setting["policy"].config
    theirs: Any = UNet2DConditionModel(**{f.name: getattr(c, f.name) for f in fields(c)})
    theirs.to(device).eval()
    theirs.load_state_dict(unet.state_dict())
    theirs.to(memory_format=torch.channels_last)
    models: dict[str, Callable] = {
        "ours": unet,
        "theirs": lambda x, t, context: theirs(x, t, encoder_hidden_states=context, return_dict=False)[0],
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    latents: dict[str, Tensor] = {}
    for round_ in range(cfg.rounds + 1):
        for name, model in models.items():
            begun = now(device)
            trajectory = rollout(
                model,
                setting["schedule"],
                replace(setting["condition"], empty=None),
                shape=setting["shape"],
                steps=cfg.sampling_steps,
                generator=torch.Generator().manual_seed(cfg.seed),
            )
            times[name] += [now(device) - begun] if round_ else []
            latents[name] = trajectory.latents[:, -1]
    ratio = median([b / a for a, b in zip(times["ours"], times["theirs"])])
    return (
        f"The sampling loop is {ratio:.2f} times as fast with our UNet as with diffusers' on the same weights (largest "
        f"difference of the latents {float((latents['ours'] - latents['theirs']).abs().max()):.1e})."
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
    cfg = parse(BenchConfig, argv, prog="python -m minipref bench", description=__doc__ or "", renamed=RENAMED["bench"])
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.train_steps > cfg.sampling_steps:
        raise ValueError(f"--train-steps {cfg.train_steps}: a rollout has --sampling-steps {cfg.sampling_steps}")
    device = pick_device(cfg.device)
    if cfg.out:
        check_place(cfg.out, "--out")
    command = shlex.join(argv if argv is not None else sys.argv[2:])
    text = [f"`python -m minipref bench {command}`  ", machine(device), ""]
    if cfg.part in ("kernels", "all"):
        fits = device.type == "cuda" and common.triton is not None
        table = kernel_table(device) if fits else "No CUDA device with Triton: kernels are not timed."
        text += ["## Kernels", "", table, ""]
    if cfg.part in ("loop", "all"):
        text += ["## The loop", "", loop_table(cfg, device), ""]
        if cfg.size == "small":
            text += [rival_line(cfg, device), ""]
    if cfg.part == "epoch":
        text += ["## An epoch", "", epoch_table(cfg.rounds, cfg.threads), ""]
    print("\n".join(text))
    if cfg.out:
        write_text(cfg.out, "\n".join(text))
