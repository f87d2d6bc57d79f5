"""What is measured, as pure functions of tensors. P prompts, S samples a prompt, N pictures."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def win_rate(candidate: Tensor, base: Tensor) -> float:
    """Share of prompts where the best of S samples beats one base sample (PrefPaint, WinRate). Ties count ½.

    candidate (P, S): judge's scores of S samples a prompt;  base (P,): of one *independent* base sample.
    """
    if candidate.ndim != 2 or base.shape != candidate.shape[:1]:
        raise ValueError(
            f"win_rate: candidate {tuple(candidate.shape)}, base {tuple(base.shape)}; expected (P, S), (P,)"
        )
    best = candidate.max(1).values
    return float(((best > base).double() + 0.5 * (best == base).double()).mean())


def self_win_rate(samples: int) -> float:
    """What a model scores against itself: the best of S beats one more of the same kind in S of S + 1 cases."""
    return samples / (samples + 1)


def wilson_interval(rate: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval for a share observed in `count` independent cases; z = 1.96 for 95 % (Wilson 1927)."""
    if not 0 <= rate <= 1 or count < 1:
        raise ValueError(f"wilson_interval: rate={rate}, count={count}; expected a share of at least one case")
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


# Two-sided 95 % quantiles of Student's t with 1, 2, … degrees of freedom.
T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
)  # fmt: skip


def t_interval(x: Tensor) -> tuple[float, float]:
    """Student's 95 % interval for the mean of independent x (N,), N ≥ 2; beyond 21 values, the quantile of 21."""
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"t_interval: x {tuple(x.shape)}; expected at least two values (N,)")
    x = x.double()
    half = T_QUANTILES[min(len(x) - 1, len(T_QUANTILES)) - 1] * float(x.std()) / math.sqrt(len(x))
    return float(x.mean()) - half, float(x.mean()) + half


def _centred(x: Tensor, groups: Tensor) -> Tensor:
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, index, x.double())
    return x.double() - (sums / counts)[index]


def _pearson(x: Tensor, y: Tensor) -> float:
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else math.nan


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 0, ties sharing their mean rank."""
    _, index, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts + 1) / 2)[index]


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of x and y (N,); NaN where one of them is constant."""
    return _pearson(_ranks(x), _ranks(y))


def within_prompt_correlation(x: Tensor, y: Tensor, groups: Tensor) -> float:
    """Pearson correlation after each prompt's mean is taken off both: all that RL with group baselines can use."""
    return _pearson(_centred(x, groups), _centred(y, groups))


def pair_accuracy(guess: Tensor, truth: Tensor, groups: Tensor) -> float:
    """Share of the pairs of one prompt, of different truth, that the guess puts in the right order; ties count ½.

    guess, truth, groups (N,); NaN without such pairs.
    """
    i, j = ((groups[:, None] == groups[None]) & (truth[:, None] > truth[None])).nonzero(as_tuple=True)
    right = (guess[i] > guess[j]).double() + 0.5 * (guess[i] == guess[j]).double()
    return float(right.mean()) if len(i) else math.nan


def within_prompt_std(x: Tensor, groups: Tensor) -> float:
    """Root mean square distance of x (N,) from its prompt's mean: the spread that selection works on."""
    return float(_centred(x, groups).square().mean().sqrt())


def r_squared(prediction: Tensor, truth: Tensor) -> float:
    """1 − residual variance / variance of the truth."""
    residual = (prediction.double() - truth.double()).square().sum()
    return 1 - float(residual / (truth.double() - truth.double().mean()).square().sum())


def diversity(images: Tensor, masks: Tensor, groups: Tensor) -> float:
    """Mean absolute difference, over the hole, between two samples of one prompt: 0 when all are alike.

    images (N, 3, H, W) in [0, 1], masks (N, 1, H, W), groups (N,); all pairs within each group. NaN without pairs.
    """
    distances = []
    for g in groups.unique():
        member = (groups == g).nonzero()[:, 0].tolist()
        for k, i in enumerate(member):
            for j in member[:k]:
                difference = (images[i] - images[j]).abs().mean(0, keepdim=True)
                distances.append(float((difference * masks[i]).sum() / masks[i].sum()))
    return sum(distances) / len(distances) if distances else math.nan


def quantiles(x: Tensor, name: str) -> dict[str, float]:
    """{name_q10, name_q50, name_q90} of x (N,)."""
    return {f"{name}_q{round(100 * q)}": float(x.double().quantile(q)) for q in (0.1, 0.5, 0.9)}
