"""Fitting a reward model: features on one split of the prompts, last layer and V on a second, figures on a third.

PrefPaint Sections 3 and 4; `train_reward.py` is the script around it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .data import ratings as R
from .evaluate import Judged, judge_reward
from .losses import bradley_terry_loss
from .models.reward_features import ClipFeatures, RewardFeatures
from .pipeline import Pipeline
from .presets import SMALL_FEATURES
from .rewards import Calibration, LearnedReward, features_of, ridge_fit, trust_from_quantiles
from .runtime.config import opt
from .runtime.runlog import progress


@dataclass(frozen=True)
class FitConfig:
    seed: int = opt(0, "seed of prompts, noise, raters, splits and weights", lo=0, hi=999_999)
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
    batch: int = opt(32, "rated pictures a batch (PrefPaint: 5)", lo=2)
    lr: float = opt(0.0, "peak learning rate of AdamW; 0: 1.5e-3 for conv, 5e-4 for clip (PrefPaint: 1e-5)", lo=0)
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


def new_features(cfg: FitConfig, pipe: Pipeline) -> nn.Module:
    torch.manual_seed(cfg.seed)
    if cfg.features == "conv":
        return RewardFeatures(replace(SMALL_FEATURES, dim=cfg.dim))
    return ClipFeatures.start_from(copy.deepcopy(pipe.clip).cpu(), cfg.dim, cfg.freeze)


def fit_features(
    features: Any, r: R.Ratings, y: Tensor, cfg: FitConfig, log: Callable = lambda **row: None
) -> nn.Module:
    """Trains the extractor, on the CPU, on normalised labels y (N,) of one split. Its last layer is thrown away."""
    dim, bins = features.config.dim, cfg.bins if cfg.objective == "bins" else 1
    torch.manual_seed(cfg.seed)
    last = nn.Linear(dim, bins, bias=bins > 1)
    edges = y.double().quantile(torch.linspace(0, 1, cfg.bins + 1, dtype=torch.float64)[1:-1]).float()
    peak = cfg.lr or (1.5e-3 if cfg.features == "conv" else 5e-4)
    trained = [p for p in [*features.parameters(), *last.parameters()] if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=peak, weight_decay=0.01, fused=True)
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


def solve(features: Any, r: R.Ratings, norms: dict, cfg: FitConfig) -> tuple[LearnedReward, dict[str, float]]:
    """Last layer and V in closed form on a split that the features have not seen, so that Eqs. 3-10 apply.

    Returns the model and two estimates of the noise scale: from raters who rated the same picture, and from the
    residuals, which also hold what no linear layer explains. The bound assumes the larger, unless told otherwise.
    """
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
    r: dict[str, R.Ratings], cfg: FitConfig, pipe: Pipeline, log: Callable = lambda **row: None
) -> tuple[LearnedReward, Judged, dict]:
    """Features on the first split, last layer and V on the second, figures on the third's completions."""
    norms = R.label_norms(r["features"])
    y = R.normalise(r["features"].labels, r["features"].strata, norms)
    features = fit_features(new_features(cfg, pipe), r["features"], y, cfg, log)
    model, noise = solve(features, r["ridge"], norms, cfg)
    judged = judge_reward(model, r["calibration"], cfg.delta)
    c = model.calibration
    return model, judged, judged.figures | noise | {"noise_scale": c.noise_scale, "psi_norm": c.psi_norm}
