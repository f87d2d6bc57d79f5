"""`python -m minipref bench`: what each fused kernel and each saving of the loop is worth on this machine, as Markdown.

Two tables. Kernels (on a CUDA device with Triton): PyTorch's own operations, `torch.compile` and the fused kernel at
the sizes of three UNets, forward and backward, beside the bandwidth of a plain copy measured in the same run. The loop
(anywhere): one RL iteration against the wasteful form that PrefPaint's released code has, each saving alone and all
together, from the same weights and noise, with the largest difference of the weights that come out.
"""

from __future__ import annotations

import copy
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import kernels as K
from .data.prompts import scene_prompts
from .diffusion import Condition, Schedule, ScheduleConfig, ddim_step, predict
from .kernels import common
from .kernels.ddim_step_logprob import ddim_step_logprob_reference
from .kernels.preference_loss import preference_loss_reference
from .kernels.q_sample import q_sample_reference
from .losses import clipped_surrogate
from .models.layers import GEGLU
from .models.unet import UNet, UNetConfig
from .pipeline import Pipeline, pick_device
from .presets import SMALL_UNET
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
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0)


SD_INPAINTING = UNetConfig(in_channels=9)  # Stable Diffusion 1.5
MID = UNetConfig(  # 31 million parameters
    in_channels=9, block_out_channels=(128, 256, 256), attention_head_dim=4, cross_attention_dim=256,
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip

# ------------------------------------------------------------------------------------------------ kernels


def norms_and_gates(config: UNetConfig, batch: int, size: int) -> tuple[list[tuple], list[tuple]]:
    """The different shapes of (GroupNorm input, groups) and of GEGLU inputs in a UNet, largest first, none computed."""
    norms, gates = set(), set()
    with torch.device("meta"):
        unet = UNet(config)
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(lambda m, x: norms.add((tuple(x[0].shape), m.num_groups)))
            if isinstance(module, GEGLU):
                module.proj.register_forward_hook(lambda m, x, y: gates.add(tuple(y.shape)))
        x, t = torch.empty(batch, config.in_channels, size, size), torch.empty(batch, dtype=torch.long)
        unet(x, t, torch.empty(batch, 77, config.cross_attention_dim))

    def elements(shape: tuple[int, ...]) -> int:
        return torch.Size(shape).numel()

    return (
        sorted(norms, key=lambda v: -elements(v[0])),
        sorted(gates, key=lambda v: -elements(v)),
    )


@dataclass(frozen=True)
class Case:
    """One operation at one size: `eager` and `fused` take `inputs`; the least bytes that must move each way."""

    name: str
    eager: Callable
    fused: Callable
    inputs: list[Tensor]
    forward_bytes: int
    backward_bytes: int


SIZES = (  # name, UNet, batch, latent size, dtype
    ("toy", SMALL_UNET, 64, 16, torch.float32),
    ("mid", MID, 64, 32, torch.bfloat16),
    ("sd", SD_INPAINTING, 16, 64, torch.bfloat16),
)


def cases(device: torch.device, sizes: Iterable[tuple] = SIZES) -> Iterable[Case]:
    """Every kernel at the sizes of the toy (fp32), a mid-sized UNet (bf16) and Stable Diffusion 1.5 (bf16)."""
    for name, config, batch, size, dtype in sizes:
        norms, gates = norms_and_gates(config, batch, size)

        def make(*shape: int, grad: bool = False, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype, requires_grad=grad)

        for layout in (torch.contiguous_format, torch.channels_last):
            for shape, groups in norms[:2] + norms[-1:]:
                x = make(*shape).to(memory_format=layout).requires_grad_()
                weight, bias = make(shape[1], grad=True), make(shape[1], grad=True)
                moved = x.numel() * x.element_size()

                def eager(x, weight, bias, groups=groups):
                    return F.silu(F.group_norm(x, groups, weight, bias))

                def fused(x, weight, bias, groups=groups):
                    a, b = (v.expand(len(x), -1) for v in (weight, bias))
                    return K.group_norm_act(x, a, b, groups, impl="triton")

                where = "NHWC" if layout == torch.channels_last else "NCHW"
                label = f"group_norm_act {name} {'×'.join(map(str, shape))} {where}"
                yield Case(label, eager, fused, [x, weight, bias], 2 * moved, 3 * moved)
        for shape in gates[:2]:
            h = make(*shape, grad=True)
            moved = h.numel() * h.element_size() // 2  # of y

            def gated(h):
                value, gate = h.chunk(2, -1)
                return value * F.gelu(gate)

            label = f"geglu {name} {'×'.join(map(str, shape))}"
            yield Case(label, gated, lambda h: K.geglu(h, impl="triton"), [h], 3 * moved, 5 * moved)
        latent = batch, config.out_channels, size, size
        one = make(*latent).numel() * make(1).element_size()
        a, s, sigma = (make(batch, dtype=torch.float32).abs() + 0.1 for _ in range(3))
        label = "×".join(map(str, latent))
        yield Case(
            f"q_sample {name} {label}",
            lambda x, e, a=a, s=s: q_sample_reference(x, e, a, s),
            lambda x, e, a=a, s=s: K.q_sample(x, e, a, s, impl="triton"),
            [make(*latent, grad=True), make(*latent, grad=True)], 3 * one, 3 * one,
        )  # fmt: skip
        step = {"x_t": make(*latent), "x_prev": make(*latent), "k_x": a, "k_eps": s, "sigma": sigma, "guidance": 3.0}
        kept = make(*latent).numel() * 4  # d log p/d eps, fp32
        yield Case(
            f"ddim_step_logprob {name} {label}",
            lambda u, e, step=step: ddim_step_logprob_reference(u, e, **step)[1],
            lambda u, e, step=step: K.ddim_step_logprob(u, e, **step, impl="triton")[1],
            [make(*latent, grad=True), make(*latent, grad=True)], 4 * one + kept, 2 * one + kept,
        )  # fmt: skip
        pair: dict[str, Any] = {k: make(*latent) for k in ("base_ref", "base_gen", "target_ref", "target_gen")}
        pair |= {"label": torch.rand(batch, device=device), "beta": 1.0}
        yield Case(
            f"preference_loss {name} {label}",
            lambda p, q, pair=pair: preference_loss_reference(p, q, **pair)[0],
            lambda p, q, pair=pair: K.preference_loss_from_predictions(p, q, **pair, impl="triton")[0],
            [make(*latent, grad=True), make(*latent, grad=True)], 6 * one, 6 * one,
        )  # fmt: skip


def milliseconds(function: Callable) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile by CUDA events."""
    return common.triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8])


def copy_bandwidth(device: torch.device, megabytes: int = 512) -> float:
    """Bytes read and written a second by a plain copy."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source))[0] / 1000)


def kernel_table(device: torch.device) -> str:
    bandwidth = copy_bandwidth(device)
    lines = [
        f"Copy bandwidth: {bandwidth / 1e12:.2f} TB/s. Times in ms: median (20th–80th percentile). Share: least bytes "
        "over the time of the fused kernel, of the copy bandwidth. Peak: memory above the inputs, MiB.",
        "",
        "| operation | pass | PyTorch | torch.compile | fused | share | peaks in this order |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases(device):
        lines += rows(case, bandwidth)
    return "\n".join(lines)


def rows(case: Case, bandwidth: float) -> list[str]:
    """One line a pass: times of the three forms, the fused one's share of the bandwidth, peak memory of all three."""
    torch._dynamo.reset()
    forms = {"eager": case.eager, "compiled": torch.compile(case.eager), "fused": case.fused}
    outputs = {k: f(*case.inputs) for k, f in forms.items()}
    expected = outputs["eager"].detach()
    # The gradient comes in each form's own layout, as from a layer that follows it.
    incoming = torch.randn(expected.shape, device=expected.device, dtype=expected.dtype)
    grads = {k: torch.empty_like(y).copy_(incoming) for k, y in outputs.items()}

    def backward(form: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs[form], case.inputs, grads[form], retain_graph=True)

    slopes = {k: backward(k) for k in forms}
    for form in ("compiled", "fused"):
        for a, b in zip((outputs[form], *slopes[form]), (outputs["eager"], *slopes["eager"])):
            wrong = float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-6))
            if not wrong < 0.05:
                raise RuntimeError(f"{case.name}: {form} differs from PyTorch by {wrong:.2g}")

    def both(form: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forms[form](*case.inputs), case.inputs, grads[form])

    passes: dict[str, tuple[Callable[[str], Any], int]] = {
        "forward": (lambda form: forms[form](*case.inputs), case.forward_bytes),
        "backward": (backward, case.backward_bytes),
        "both": (both, case.forward_bytes + case.backward_bytes),
    }
    lines = []
    for name, (call, least) in passes.items():
        times, peaks = {}, []
        for form in forms:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call(form)
            peaks.append(f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}")
            times[form] = milliseconds(partial(call, form))
        cells = [f"{m:.3f} ({lo:.3f}–{hi:.3f})" for m, lo, hi in times.values()]
        share = least / (times["fused"][0] / 1000) / bandwidth
        lines.append(f"| {case.name} | {name} | {' | '.join(cells)} | {share:.0%} | {' / '.join(peaks)} |")
    return lines


# ------------------------------------------------------------------------------------------------ the loop


@dataclass(frozen=True)
class Savings:
    """What the released loop wastes, and this one saves."""

    one_branch: bool = True  # both guidance branches have the same prompt: one call of the UNet is exactly the same
    keep_activations: bool = True  # no gradient checkpointing where memory allows
    no_waiting: bool = True  # nothing is read back from the device inside the loops


@dataclass(frozen=True)
class Outcome:
    """What an iteration computes (latents, log-probabilities, gradients before they are clipped) and its seconds."""

    results: list[Tensor]
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
    tables = [v.float().to(device)[:, None].expand(-1, B) for v in schedule.coefficients(timesteps, following, 1.0)]
    scored, on_device = (
        schedule.coefficients(timesteps, following, 1.0)[2] > 0,
        timesteps.to(device)[:, None].expand(-1, B),
    )
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
    gradients = [p.grad.detach().float().clone() for p in policy.parameters() if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimiser.step()
    results = [latents[-1].float(), torch.stack(log_probs, 1)[:, scored].float(), *gradients]
    return Outcome(results, rolled - started, now(device) - rolled)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
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
        f"medians of {cfg.rounds} rounds in turn. Difference: largest of latents, log-probabilities and gradients from "
        "the wasteful form's, as a share of each tensor's largest entry.",
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
