"""Losses as pure functions of tensors.

A          advantage                          (B,)
gamma      trust weight of a sample           (B,)
log_prob   mean over the n dimensions of a step's Gaussian log-density (see diffusion.gaussian_log_prob)
r          probability ratio exp(log_prob − log_prob_old): the joint ratio to the power 1/n
theta, base  the model that learns and the frozen one; ref, gen: a reference picture and one that the base has drawn
l          preference margin: how much more theta has gained on ref than on gen (B,), in mean squared error
y          label, the probability that ref is preferred to gen (B,); beta: slope of the preference in l
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# RPO Eqs. 4 and 7, and Diffusion-DPO's: they stand beside their fused form and are its specification.
from .kernels.preference_loss import denoising_loss as denoising_loss
from .kernels.preference_loss import preference_loss as preference_loss
from .kernels.preference_loss import preference_margin as preference_margin
from .kernels.preference_loss import same_shape


def bradley_terry_loss(scores: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
    """−log sigmoid(score of the better − score of the worse), averaged over a prompt's pairs that differ in label.

    scores, labels, groups (B,) -> a number; 0 where no prompt has two different labels (Bradley and Terry 1952).
    """
    same_shape("bradley_terry_loss", scores=scores, labels=labels, groups=groups)
    better, worse = ((groups[:, None] == groups[None]) & (labels[:, None] > labels[None])).nonzero(as_tuple=True)
    return -F.logsigmoid(scores[better] - scores[worse]).sum() / max(1, len(better))


def advantages(rewards: Tensor, groups: Tensor, *, eps: float = 1e-7, clip: float = 10.0) -> Tensor:
    """A = (R − mean of its prompt's group) / (standard deviation over the batch + eps), clamped to ±clip.

    rewards (B,), groups (B,) int64: the prompt of each sample. PrefPaint subtracts the mean of the whole batch; with
    several samples a prompt the group's mean removes what the prompt, not the completion, is worth. One sample a
    prompt falls back to the batch mean. The standard deviation is that of the centred rewards.
    """
    same_shape("advantages", rewards=rewards, groups=groups)
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    if counts.max() > 1:
        means = torch.zeros(len(counts), dtype=rewards.dtype, device=rewards.device).index_add_(0, index, rewards)
        centred = rewards - (means / counts)[index]
    else:
        centred = rewards - rewards.mean()
    return (centred / (centred.square().mean().sqrt() + eps)).clamp(-clip, clip)


def clipped_surrogate(
    log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, *, clip_range: float, n: int, gamma: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """gamma·max(−A·r, −A·clip(r, 1 ± clip_range/n)), averaged over the batch (PrefPaint Eqs. 1 and 12; PPO).

    All inputs (B,). `clip_range` is in units of the *joint* log-ratio, so one number means the same at every image
    size; the paper's 1e-4 at n = 16,384 is 1.64 here.
    Returns the loss, the ratios (B,), and which samples the clip silenced (B,), bool: their gradient is zero.
    """
    gamma = torch.ones_like(advantage) if gamma is None else gamma
    same_shape("clipped_surrogate", log_prob=log_prob, log_prob_old=log_prob_old, advantage=advantage, gamma=gamma)
    ratio = (log_prob - log_prob_old).exp()
    width = clip_range / n
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - width, 1 + width)
    loss = (gamma * torch.maximum(plain, clipped)).mean()
    return loss, ratio.detach(), (clipped > plain).detach()


def gaussian_kl(mean: Tensor, mean_ref: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mean, sigma²) ‖ N(mean_ref, sigma²)) = ‖mean − mean_ref‖² / (2 sigma²), in nats: (B, …) -> (B,).

    Summed over dimensions. The training loss uses this divided by n, the reduction of the log-probability
    (PrefPaint Eq. 1, the kappa term, in closed form for one step).
    """
    same_shape("gaussian_kl", mean=mean, mean_ref=mean_ref)
    return ((mean - mean_ref).square() / (2 * sigma**2)).flatten(1).sum(1)


def preference_label(
    reward_ref: Tensor, reward_gen: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """P(ref ≻ gen) = sigmoid((r_ref − r_gen)/temperature) (RPO Eq. 6), element by element; with a generator a draw
    from it, 0 or 1.

    Temperature 1 is the paper's. Its rewards lie in [0, 1], so its labels are nearly coin flips.
    """
    same_shape("preference_label", reward_ref=reward_ref, reward_gen=reward_gen)
    probability = torch.sigmoid((reward_ref - reward_gen) / temperature)
    if generator is None:
        return probability
    return torch.bernoulli(probability, generator=generator)
