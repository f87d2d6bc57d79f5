"""Diffusion: the noise schedule, one DDIM step with its exact log-probability, guidance, rollouts.

    x_0      clean latent                      (B, C, H, W)
    x_t      noisy latent: sqrt(abar_t)·x_0 + sqrt(1 − abar_t)·eps
    abar_t   cumulative noise schedule (PrefPaint writes alpha_t)
    eps      the noise;  v = sqrt(abar_t)·eps − sqrt(1 − abar_t)·x_0
    sigma_t  standard deviation of a sampling step; eta scales it (0: DDIM, 1: DDPM's posterior)
    n        C·H·W, the dimensions of a latent
    B, T     batch, sampling steps

Times are integers of the training schedule, 0 (almost clean) to `num_train_timesteps` − 1 (noise). They live on
the CPU: the host knows the schedule, so that sampling never waits for the device. t_prev = −1 is "fully denoised".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .kernels import ddim_step_logprob, q_sample
from .kernels.ddim_step_logprob import gaussian_log_prob as gaussian_log_prob  # the log-probability of a step
from .kernels.ddim_step_logprob import step_gaussian

# ------------------------------------------------------------------------------------------------ the schedule

MOST_TIMES = 100_000  # of a noise schedule


@dataclass(frozen=True)
class ScheduleConfig:
    """Names and meanings as in diffusers' scheduler files."""

    num_train_timesteps: int = 1000
    beta_schedule: str = "scaled_linear"  # "linear", "scaled_linear", "squaredcos_cap_v2" (cosine)
    beta_start: float = 0.00085  # not read by the cosine schedule
    beta_end: float = 0.012
    prediction_type: str = "epsilon"  # what the network predicts: "epsilon" or "v_prediction"
    timestep_spacing: str = "leading"  # "leading", "trailing", "linspace"
    steps_offset: int = 1  # added to the times of "leading"
    set_alpha_to_one: bool = False  # abar after the last step: 1, or that of time 0


class Schedule:
    """Tables of the forward process, float64."""

    def __init__(self, config: ScheduleConfig):
        self.config = c = config
        N = c.num_train_timesteps
        if not 0 < N <= MOST_TIMES or not 0 <= c.steps_offset < N:
            raise ValueError(f"num_train_timesteps={N}, steps_offset={c.steps_offset}: choose 1 to 100000, 0 to less")
        if c.beta_schedule != "squaredcos_cap_v2" and not (0 < c.beta_start < 1 and 0 < c.beta_end < 1):
            raise ValueError(f"beta_start={c.beta_start}, beta_end={c.beta_end}: choose more than 0 and less than 1")
        if c.beta_schedule == "linear":
            betas = torch.linspace(c.beta_start, c.beta_end, N, dtype=torch.float64)
        elif c.beta_schedule == "scaled_linear":
            betas = torch.linspace(c.beta_start**0.5, c.beta_end**0.5, N, dtype=torch.float64) ** 2
        elif c.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, Eq. 17; betas capped at 0.999

            def alpha_bar(u: Tensor) -> Tensor:
                return torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

            u = torch.arange(N + 1, dtype=torch.float64) / N
            betas = (1 - alpha_bar(u[1:]) / alpha_bar(u[:-1])).clamp(max=0.999)
        else:
            raise ValueError(f"beta_schedule={c.beta_schedule!r}; choose linear, scaled_linear or squaredcos_cap_v2")
        if c.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type={c.prediction_type!r}; choose epsilon or v_prediction")
        if c.timestep_spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f"timestep_spacing={c.timestep_spacing!r}; choose leading, trailing or linspace")
        self.betas = betas
        self.abar = torch.cumprod(1 - betas, dim=0)  # (N,)
        self.final_abar = torch.tensor(1.0, dtype=torch.float64) if c.set_alpha_to_one else self.abar[0]

    def __len__(self) -> int:
        return len(self.betas)

    def abar_at(self, t: Tensor) -> Tensor:
        """abar at times t (any shape); times below 0 are after the last step. float64, CPU."""
        t = t.cpu()
        return torch.where(t >= 0, self.abar[t.clamp(min=0)], self.final_abar)

    def timesteps(self, steps: int) -> Tensor:
        """The T times of a sampling run, descending: (steps,) int64 (spacings as in Lin et al. 2023, Table 2)."""
        N, spacing = len(self), self.config.timestep_spacing
        if not 1 <= steps <= N:
            raise ValueError(f"--sampling-steps {steps}: choose 1 to {N}, the times of the noise schedule")
        if spacing == "leading":
            t = torch.arange(steps) * (N // steps) + self.config.steps_offset
        elif spacing == "trailing":
            stride = (N - N / steps) - N  # −N/steps as numpy's arange forms it: rounding ties fall as diffusers' do
            t = (N + torch.arange(steps, dtype=torch.float64) * stride).round().long().flip(0) - 1
        else:
            t = (torch.arange(steps, dtype=torch.float64) * ((N - 1) / max(steps - 1, 1))).round().long()
        if t[-1] >= N:
            raise ValueError(f"steps={steps}, steps_offset={self.config.steps_offset}: they begin beyond time {N - 1}")
        return t.flip(0)

    def coefficients(self, t: Tensor, t_prev: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
        """k_x, k_out, sigma of the step t → t_prev, float64, shaped like t:

            x_prev ~ N(k_x·x_t + k_out·model_output, sigma²)

        PrefPaint Eq. 2 (DDIM, Song et al. 2021, Eq. 12 and 16) with x0_hat and eps_theta substituted:
            sigma² = eta²·(1 − abar_prev)/(1 − abar_t)·(1 − abar_t/abar_prev)
            mean   = sqrt(abar_prev)·x0_hat + sqrt(1 − abar_prev − sigma²)·eps_theta
        Going through eps in single precision instead loses three digits at t = 999 with v-prediction.
        """
        a, p = self.abar_at(t), self.abar_at(t_prev)
        sigma = eta * ((1 - p) / (1 - a) * (1 - a / p)).clamp(min=0).sqrt()
        toward = (1 - p - sigma**2).clamp(min=0).sqrt()  # weight of eps_theta
        if self.config.prediction_type == "epsilon":  # x0_hat = (x_t − sqrt(1 − a)·eps)/sqrt(a)
            k_x = (p / a).sqrt()
            k_out = toward - (p * (1 - a) / a).sqrt()
        else:  # x0_hat = sqrt(a)·x_t − sqrt(1 − a)·v;  eps = sqrt(a)·v + sqrt(1 − a)·x_t
            k_x = (p * a).sqrt() + toward * (1 - a).sqrt()
            k_out = toward * a.sqrt() - (p * (1 - a)).sqrt()
        return k_x, k_out, sigma


def _vector(values: Tensor, like: Tensor) -> Tensor:
    """(B,) float64 on the CPU -> (B,) fp32 (or like's float64) on like's device."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return values.to(dtype).to(like.device, non_blocking=True)


def _times(t: Tensor | int, batch: int) -> Tensor:
    return torch.as_tensor(t, dtype=torch.int64).cpu().expand(batch)


def add_noise(schedule: Schedule, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = sqrt(abar_t)·x_0 + sqrt(1 − abar_t)·noise.  x_0, noise (B, C, H, W), t (B,)."""
    if x_0.shape != noise.shape:
        raise ValueError(f"add_noise: x_0 is {tuple(x_0.shape)} but noise is {tuple(noise.shape)}")
    a = schedule.abar_at(_times(t, len(x_0)))
    return q_sample(x_0, noise, _vector(a.sqrt(), x_0), _vector((1 - a).sqrt(), x_0))


def target(schedule: Schedule, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network should predict: eps, or v = sqrt(abar_t)·eps − sqrt(1 − abar_t)·x_0 (Salimans & Ho 2022)."""
    if schedule.config.prediction_type == "epsilon":
        return noise
    a = schedule.abar_at(_times(t, len(x_0)))
    sqrt_a, sqrt_rest = (_vector(v, x_0)[:, None, None, None] for v in (a.sqrt(), (1 - a).sqrt()))
    return sqrt_a * noise - sqrt_rest * x_0


# ------------------------------------------------------------------------------------------------ one step


def _coefficients(schedule: Schedule, x_t: Tensor, t: Tensor | int, t_prev: Tensor | int, eta: float):
    """k_x, k_out and sigma of `Schedule.coefficients`, (B,) each, on x_t's device."""
    B = len(x_t)
    k_x, k_out, sigma = schedule.coefficients(_times(t, B), _times(t_prev, B), eta)
    return _vector(k_x, x_t), _vector(k_out, x_t), _vector(sigma, x_t)


def ddim_step(
    schedule: Schedule,
    model_output: Tensor,
    x_t: Tensor,
    t: Tensor | int,
    t_prev: Tensor | int,
    *,
    eta: float,
    noise: Tensor | None = None,
    x_prev: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sampling step: draws x_prev = mean + sigma·noise, or scores the `x_prev` it is given (PrefPaint Eq. 2).

    model_output, x_t, noise, x_prev (B, C, H, W); t, t_prev int or (B,).
    Returns x_prev in x_t's dtype and its log-probability (B,), fp32, the mean over dimensions. The drawn latent is
    rounded to x_t's dtype *before* it is scored, so that a later replay scores the same number. Where sigma = 0 the
    step is deterministic and has no density: its log-probability is NaN. `rollout` and `replay` take the same step with
    coefficients at hand: another sampler begins in `Schedule.coefficients`.
    """
    coefficients = _coefficients(schedule, x_t, t, t_prev, eta)
    return ddim_step_logprob(model_output, x_t, *coefficients, noise=noise, x_prev=x_prev)


# ------------------------------------------------------------------------------------------------ condition, guidance


@dataclass(frozen=True)
class Condition:
    """What a completion is conditioned on, encoded once per batch.

    context (B, L, D): text;  empty (B, L, D) or None: the empty text, read by guidance ≠ 1 (either may be one text
    expanded to B, stride 0: the UNet then computes its keys and values once);
    mask (B, M, h, w) and masked (B, C, h, w): hole and masked picture on the latent grid, or None for a model
    without inpainting channels.
    """

    context: Tensor
    mask: Tensor | None = None
    masked: Tensor | None = None
    empty: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, index) -> Condition:
        """The samples that `index` (slice or tensor) selects."""

        def rows(v: Tensor) -> Tensor:
            if not isinstance(index, Tensor) or v.stride(0) > 0:
                return v[index]
            return v[:1].expand(len(torch.arange(len(self))[index]), *v.shape[1:])  # one text for all stays one

        return Condition(**{k: rows(v) for k, v in vars(self).items() if v is not None})

    def unet_input(self, x_t: Tensor) -> Tensor:
        """cat[noisy latent, mask, masked-image latent] along the channels, as Stable Diffusion inpainting has it."""
        if self.mask is None:
            return x_t
        assert self.masked is not None
        return torch.cat([x_t, self.mask.to(x_t.dtype), self.masked.to(x_t.dtype)], dim=1)


def needs_guidance(condition: Condition, guidance: float) -> bool:
    """False where both branches would be equal: a scale of 1, no empty text, or prompts that are the empty text."""
    return guidance != 1 and condition.empty is not None and not torch.equal(condition.context, condition.empty)


def predict(unet, x_t: Tensor, t: Tensor | int, condition: Condition, *, guidance: float = 1.0) -> Tensor:
    """The network's output with classifier-free guidance (Ho & Salimans 2022): empty + guidance·(text − empty).

    One call of the network where guidance changes nothing. Rollout and training both come here, so the two halves
    can never be confused between them.
    """
    times = _times(t, len(x_t)).to(x_t.device, non_blocking=True)
    return _predict(unet, x_t, times, condition, guidance, needs_guidance(condition, guidance))


def _predict(unet, x_t: Tensor, times: Tensor, condition: Condition, guidance: float, guided: bool) -> Tensor:
    x = condition.unet_input(x_t)
    if not guided:
        return unet(x, times, condition.context)
    assert condition.empty is not None
    both = torch.cat([condition.empty, condition.context])
    without, with_text = unet(torch.cat([x, x]), torch.cat([times, times]), both).chunk(2)
    return without + guidance * (with_text - without)


# ------------------------------------------------------------------------------------------------ rollouts


@dataclass(frozen=True)
class Trajectory:
    """A sampled denoising path. Step i goes from latents[:, i] at timesteps[i] to latents[:, i + 1]."""

    latents: Tensor  # (B, T+1, C, H, W); [:, 0] is noise, [:, -1] the result
    log_probs: Tensor  # (B, T) fp32, NaN where the step is not scored
    timesteps: Tensor  # (T,) int64, CPU
    scored: Tensor  # (T,) bool, CPU: the step is random (sigma > 0)

    @property
    def next_timesteps(self) -> Tensor:
        """The time that each step leads to, (T,); −1 after the last."""
        return torch.cat([self.timesteps[1:], self.timesteps.new_tensor([-1])])


# Where noise is drawn outside training epochs (those are numbered from 1): published figures rest on these numbers.
# Epochs may reach the judges' of `evaluate`, but train on other prompts.
STREAMS = {
    "curves": -1,  # the fixed held-out prompts of a run's curves
    "judge base": -2,  # the final comparison: independent noise for the two models
    "judge aligned": -3,
    "kl": -4,  # KL of whole rollouts
    "training pictures": -10,  # RPO: pictures of the training, validation and test prompts
    "validation": -11,
    "test": -12,
    "sample": 0,  # `sample`, completions that are rated, text-to-image
    "policies": 1,  # trust weights of several policies
    "evaluate opponent": 1000,  # `evaluate`: one sample, and the S samples of either model, counted up
    "evaluate base": 2000,
    "evaluate aligned": 3000,
}


def sample_generators(seed: int, stream: int | str, indices: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator per sample, a function of (seed, stream, global sample index) alone: results depend neither
    on how a batch is split nor on how many processes share it. `stream`: a training epoch, or a name of STREAMS."""
    number = STREAMS[stream] if isinstance(stream, str) else stream
    seeds = [np.random.SeedSequence((seed, number % 2**32, int(i))).generate_state(1, np.uint64)[0] for i in indices]
    return [torch.Generator().manual_seed(int(s >> 1)) for s in seeds]


@torch.no_grad()
def rollout(
    unet,
    schedule: Schedule,
    condition: Condition,
    *,
    shape: tuple[int, int, int],
    steps: int,
    eta: float = 1.0,
    guidance: float = 1.0,
    generator: list[torch.Generator] | torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Trajectory:
    """Samples latents of `shape` (C, H, W) by DDIM and keeps the whole path (DDPO; PrefPaint Eq. 2).

    `generator`: one CPU generator, or one for each sample (see `sample_generators`). `dtype`: storage type of the
    latents; each is rounded to it before it is scored and before it is fed on.
    """
    B, device, timesteps = len(condition), condition.context.device, schedule.timesteps(steps)
    if isinstance(generator, torch.Generator):
        noise = torch.randn(B, steps + 1, *shape, generator=generator)
    elif len(generator) == B:
        noise = torch.stack([torch.randn(steps + 1, *shape, generator=g) for g in generator])
    else:
        raise ValueError(f"rollout: {len(generator)} generators for a batch of {B}")
    noise = noise.to(device)  # (B, T+1, C, H, W)
    guided = needs_guidance(condition, guidance)  # once: comparing at every step would wait for the device

    next_timesteps = torch.cat([timesteps[1:], torch.tensor([-1])])
    tables = schedule.coefficients(timesteps, next_timesteps, eta)
    scored = tables[2] > 0
    latents, log_probs = [noise[:, 0].to(dtype)], []
    # Times and coefficients of all steps, sent to the device once.
    k_x, k_out, sigma = (_vector(v, latents[0])[:, None].expand(-1, B) for v in tables)  # (T, B)
    times = timesteps.to(device, non_blocking=True)[:, None].expand(-1, B)
    for i in range(steps):
        x_t = latents[-1]
        output = _predict(unet, x_t, times[i], condition, guidance, guided)
        x_prev, log_prob = ddim_step_logprob(output, x_t, k_x[i], k_out[i], sigma[i], noise=noise[:, i + 1])
        latents.append(x_prev)
        log_probs.append(log_prob)
    return Trajectory(torch.stack(latents, 1), torch.stack(log_probs, 1), timesteps, scored)


def replay(
    unet,
    schedule: Schedule,
    trajectory: Trajectory,
    condition: Condition,
    samples: Tensor,
    steps: Tensor,
    *,
    eta: float,
    guidance: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `unet` thinks of steps that a rollout took: sample samples[m] at step steps[m], int64 (M,) each.

    Returns log_prob (M,) of where each step led, mean over dimensions, and its Gaussian: mean (M, C, H, W) and sigma
    (M, 1, 1, 1). Before any update log_prob is that of the rollout, so that the ratio of the two is 1.
    """
    t, t_prev = trajectory.timesteps[steps], trajectory.next_timesteps[steps]
    x_t, x_prev = trajectory.latents[samples, steps], trajectory.latents[samples, steps + 1]
    output = predict(unet, x_t, t, condition[samples], guidance=guidance)
    coefficients = _coefficients(schedule, x_t, t, t_prev, eta)
    gaussian = step_gaussian(output, x_t, *coefficients)
    _, log_prob = ddim_step_logprob(output, x_t, *coefficients, x_prev=x_prev, gaussian=gaussian)
    return log_prob, *gaussian
