"""The reward model: its last layer in closed form, the bound on its error, the trust weight (PrefPaint Sections 3-4).

z          reward feature                                        (d,)
Z, y       training features (N, d) and their labels (N,)
lam        ridge penalty
V          Zᵀ Z + lam·I                                          (d, d)
psi_hat    V⁻¹ Zᵀ y, the last layer                              (d,)
‖z‖_V⁻¹    sqrt(zᵀ V⁻¹ z): how little the training data say about z
gamma      trust weight exp(−k·‖z‖_V⁻¹ + b)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import metrics
from .data.prompts import Prompts
from .data.ratings import Ratings, denormalise, normalise
from .models.reward_features import ClipFeatureConfig, ClipFeatures, FeatureConfig, RewardFeatures
from .runtime import checkpoint


@dataclass(frozen=True)
class Scores:
    """value (B,): the reward;  trust (B,) or None: gamma;  parts: further columns (B,) for the log."""

    value: Tensor
    trust: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)


DELTA = 0.05  # delta of a reward model that names none
SCORED_AT_ONCE = 256  # pictures a pass of the reward features: bounds the memory, changes no score


# ------------------------------------------------------------------------------------------------ ridge and trust


@dataclass(frozen=True)
class Ridge:
    """The last layer in closed form, and what is needed to know how far it can be trusted. All float64."""

    psi: Tensor  # (d,)
    V_cholesky: Tensor  # (d, d) lower: V = L Lᵀ
    lam: float

    def __call__(self, z: Tensor) -> Tensor:
        """zᵀ psi_hat: (B, d) -> (B,) float64."""
        return z.double() @ self.psi

    def norm(self, z: Tensor, kind: str = "theorem") -> Tensor:
        """‖z‖_V⁻¹: (B, d) -> (B,) float64.

        "theorem": sqrt(zᵀ V⁻¹ z), for which Cauchy–Schwarz holds (PrefPaint Eq. 7). "paper": ‖zᵀ V⁻¹‖₂, as the paper
        prints it and its code computes it; the bound does not hold for it.
        """
        if z.ndim != 2 or z.shape[1] != len(self.psi):
            raise ValueError(f"Ridge.norm: z is {tuple(z.shape)}, expected (B, {len(self.psi)})")
        columns = z.double().T  # (d, B)
        if kind == "theorem":
            return torch.linalg.solve_triangular(self.V_cholesky, columns, upper=False).norm(dim=0)
        if kind == "paper":
            return torch.cholesky_solve(columns, self.V_cholesky).norm(dim=0)
        raise ValueError(f"Ridge.norm: kind={kind!r}; choose theorem or paper")

    def log_det_ratio(self) -> float:
        """log( det(V) / det(lam·I) ), from the Cholesky factor (PrefPaint Eq. 8)."""
        return float(2 * self.V_cholesky.diagonal().log().sum() - len(self.psi) * math.log(self.lam))

    def left_out_norm(self, norm: Tensor) -> Tensor:
        """The norms that training features would have had, had V not held them: n/sqrt(1 − n²), (N,) -> (N,).

        In-sample n² is a leverage, always below 1 and smaller than that of a fresh feature of the same kind; new
        pictures must be compared with what is said of fresh ones (Sherman–Morrison).
        """
        return norm / (1 - norm.square()).clamp(min=1e-12).sqrt()

    def noise_from_residuals(self, Z: Tensor, y: Tensor) -> float:
        """s, estimated by the training residuals: s² = ‖y − Z psi_hat‖² / trace((I − H)²), H = Z V⁻¹ Zᵀ.

        It holds all that zᵀpsi_* does not explain, the raters' noise and the misfit of a linear model alike.
        """
        squares = torch.linalg.svdvals(Z.double()).square()
        shrunk = squares / (squares + self.lam)  # eigenvalues of H
        freedom = len(y) - 2 * float(shrunk.sum()) + float(shrunk.square().sum())
        return math.sqrt(float((self(Z) - y.double()).square().sum()) / freedom)

    def bound_factor(self, delta: float, noise_scale: float, psi_norm: float) -> float:
        """C_bound: with probability ≥ 1 − delta every error is at most C_bound·‖z‖_V⁻¹ (PrefPaint Eqs. 8–10).

        noise_scale·sqrt(2·log(det(V)^½ det(lam·I)^−½ / delta)) + sqrt(lam)·psi_norm, if the noise is sub-Gaussian with
        that scale and independent of Z, and ‖psi_*‖₂ = psi_norm: assumptions, unknowable on real data.
        """
        if not 0 < delta < 1:
            raise ValueError(f"bound: delta={delta}; choose a probability between 0 and 1")
        return noise_scale * math.sqrt(self.log_det_ratio() - 2 * math.log(delta)) + math.sqrt(self.lam) * psi_norm

    def bound(self, z: Tensor, delta: float, noise_scale: float, psi_norm: float) -> Tensor:
        """C_bound·‖z‖_V⁻¹: (B, d) -> (B,)."""
        return self.bound_factor(delta, noise_scale, psi_norm) * self.norm(z)


def ridge_fit(Z: Tensor, y: Tensor, lam: float) -> Ridge:
    """psi_hat = (Zᵀ Z + lam·I)⁻¹ Zᵀ y in float64 (PrefPaint Eqs. 3–4). Z (N, d), y (N,), lam > 0.

    The Cholesky factor of V is read off a QR of Z over sqrt(lam)·I: V itself would square Z's condition number.
    """
    if Z.ndim != 2 or y.shape != Z.shape[:1]:
        raise ValueError(f"ridge_fit: Z is {tuple(Z.shape)} and y {tuple(y.shape)}, expected (N, d) and (N,)")
    if not lam > 0:
        raise ValueError(f"ridge_fit: lam={lam}; a positive penalty keeps V invertible")
    if not (torch.isfinite(Z).all() and torch.isfinite(y).all()):
        raise ValueError("ridge_fit: features or labels are not finite; the features have diverged (lower --lr)")
    d = Z.shape[1]
    over = torch.cat([Z.double(), math.sqrt(lam) * torch.eye(d, dtype=torch.float64, device=Z.device)])
    Q, upper = torch.linalg.qr(over)
    sign = upper.diagonal().sign()  # a Cholesky factor's diagonal is positive
    L, right = (sign[:, None] * upper).T, sign * (Q[: len(y)].T @ y.double())
    psi = torch.linalg.solve_triangular(L.T, right[:, None], upper=True)[:, 0]
    return Ridge(psi, L.contiguous(), lam)


PAPER_TRUST = 0.05, 0.7  # k and b (PrefPaint Eqs. 11-12), for the paper's own norm


def trust_weight(norm: Tensor, k: float, b: float, lo: float = 0.0, hi: float = math.inf) -> Tensor:
    """gamma = exp(−k·‖z‖_V⁻¹ + b), clamped to [lo, hi] (PrefPaint Eqs. 11–12). The paper: k 0.05, b 0.7."""
    return torch.exp(-k * norm + b).clamp(lo, hi)


def trust_from_quantiles(norms: Tensor) -> tuple[float, float]:
    """k and b that make gamma 1 at the norms' median and ½ at their 95th percentile; norms without spread give gamma 1.

    Give it the training features' left-out norms. Differs from the paper: its k = 0.05 belongs to the scale of its own
    norm; with the theorem's norm it would make gamma constant.
    """
    median, high = (float(norms.double().quantile(q)) for q in (0.5, 0.95))
    if high - median <= 1e-6 * abs(median):
        return 0.0, 0.0
    k = math.log(2) / (high - median)
    return k, k * median


# ------------------------------------------------------------------------------------------------ the learned reward


TOWERS: dict[str, tuple[type, type]] = {
    "conv": (FeatureConfig, RewardFeatures),
    "clip": (ClipFeatureConfig, ClipFeatures),
}


@dataclass(frozen=True)
class Calibration:
    """What a reward model knows of itself beside psi and V."""

    k: float  # trust weight gamma = exp(−k·‖z‖_V⁻¹ + b), clamped to [lo, hi]
    b: float
    lo: float = 0.0
    hi: float = math.inf
    norm_kind: str = "theorem"  # the norm that gamma takes; the paper's constants belong to "paper"
    norm_quantiles: dict[str, float] = field(default_factory=dict)  # of the left-out training norms, by probability
    label_norms: dict[str, tuple[float, float]] = field(default_factory=dict)  # (mean, spread) by source/mask kind
    noise_scale: float = math.nan  # s, of one training label, in normalised units: an assumption of the bound
    psi_norm: float = math.nan  # ‖psi_*‖₂: an assumption; ‖psi_hat‖₂ where nothing better is known
    delta: float = DELTA  # the bounds of its scores hold with probability 1 − delta


@torch.no_grad()
def features_of(features: nn.Module, images: Tensor, prompts: Prompts) -> Tensor:
    """z (B, d) on the CPU of completions (B, 3, H, W). Scoring is always done in eval mode."""
    device = next(features.parameters()).device
    parts = (x.to(device).split(SCORED_AT_ONCE) for x in (images, prompts.masked, prompts.masks))
    return torch.cat([features.eval()(*x) for x in zip(*parts)]).cpu()


class LearnedReward(nn.Module):
    """R(x) = <F(x), psi_hat> with its error bound and trust weight (PrefPaint Sections 3–4). Always in eval mode."""

    def __init__(self, features: Any, ridge: Ridge, calibration: Calibration):
        super().__init__()
        self.features: Any = features.eval().requires_grad_(False)
        self.ridge, self.calibration = ridge, calibration

    def train(self, mode: bool = True):
        return super().train(False)  # scores never depend on a mode

    def z(self, images: Tensor, prompts: Prompts) -> Tensor:
        return features_of(self.features, images, prompts)

    def forward(self, images: Tensor, prompts: Prompts) -> Scores:
        """Scores whose parts are `norm`, ‖z‖_V⁻¹, `bound`, C_bound(delta)·norm, and `trusted`, 1 where the norm lies
        under the training norms' 99 %."""
        z, c = self.z(images, prompts), self.calibration
        norm = self.ridge.norm(z)
        gamma = trust_weight(self.ridge.norm(z, c.norm_kind), c.k, c.b, c.lo, c.hi)
        parts = {"norm": norm.float(), "trusted": (norm <= c.norm_quantiles["0.99"]).float()}
        parts["bound"] = (self.bound_factor(c.delta) * norm).float()
        return Scores(self.ridge(z).float(), gamma.float(), parts)

    def bound_factor(self, delta: float) -> float:
        """C_bound(delta) under the `assumptions`, in units of the normalised label. Errors are distances to zᵀpsi_*."""
        return self.ridge.bound_factor(delta, self.calibration.noise_scale, self.calibration.psi_norm)

    def bound(self, z: Tensor, delta: float) -> Tensor:
        """C_bound(delta)·‖z‖_V⁻¹: (B, d) -> (B,)."""
        return self.bound_factor(delta) * self.ridge.norm(z)

    def assumptions(self) -> str:
        """What every bound of this model rests on, in one line."""
        c = self.calibration
        return (
            f"the bound assumes labels = zᵀpsi_* + noise, sub-Gaussian with scale {c.noise_scale:.3g} and independent "
            f"of the features, and ‖psi_*‖₂ = {c.psi_norm:.3g}"
        )

    def save(self, path: str | Path, meta: dict) -> None:
        tower = next(name for name, (_, model) in TOWERS.items() if isinstance(self.features, model))
        state = {f"features.{k}": v for k, v in self.features.state_dict().items()}
        state |= {"psi": self.ridge.psi, "V_cholesky": self.ridge.V_cholesky}  # float64 stays float64
        config = {"tower": tower, "features": asdict(self.features.config), "lam": self.ridge.lam}
        config |= {"calibration": asdict(self.calibration)}
        checkpoint.save(path, "reward", config, state, dtype=torch.float16, meta=meta)

    @staticmethod
    def load(path: str | Path) -> LearnedReward:
        config, state, _ = checkpoint.load(path, "reward")
        own = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
        try:
            ridge = Ridge(state["psi"], state["V_cholesky"], float(config["lam"]))
            kinds, values = TOWERS[config["tower"]], config["features"]
            calibration = checkpoint.configured(Calibration, config["calibration"], path)
        except (KeyError, TypeError) as e:
            raise ValueError(f"{path}: not a whole reward model ({type(e).__name__}: {e})") from None
        return LearnedReward(checkpoint.build(*kinds, values, own, path), ridge, calibration)


# ------------------------------------------------------------------------------------------------ how good is it


@dataclass(frozen=True)
class Judged:
    """A model on ratings that it has never seen, (N,) each, in units of the normalised label."""

    guess: Tensor
    truth: Tensor  # the noise-free label where it is known, else the raters' mean
    single: Tensor  # the first rater alone
    norm: Tensor
    gamma: Tensor
    figures: dict


def judge_reward(model: LearnedReward, r: Ratings, truth: Tensor | None, delta: float) -> Judged:
    """How good a reward model is on ratings that it has never seen, and how well it knows its own error.

    truth (N,): the noise-free labels where somebody knows them (the toy world), else None: the raters' mean.
    """
    norms, strata = model.calibration.label_norms, r.strata
    scores, z = model(r.images, r.prompts), model.z(r.images, r.prompts)
    guess, truth = model.ridge(z), r.labels if truth is None else truth
    y, single = (normalise(x.double(), strata, norms) for x in (truth, r.raters[:, 0]))
    bound, norm, error = model.bound(z, delta), scores.parts["norm"], (guess - y).abs()
    on_scale = denormalise(guess, strata, norms)  # 1 to 7 again, as the raters speak
    assert scores.trust is not None
    figures = {
        "spearman": metrics.spearman(on_scale, truth),
        "within_prompt_correlation": metrics.within_prompt_correlation(guess, y, r.groups),
        "r2": metrics.r_squared(on_scale, truth),
        "pair_accuracy": metrics.pair_accuracy(guess, y, r.groups),
        "mean_error_on_scale": float((on_scale - truth).abs().mean()),
        "bound_coverage": float((error <= bound).double().mean()),
        "bound_coverage_single_rating": float(((guess - single).abs() <= bound).double().mean()),
        "bound_median": float(bound.median()),
        "error_median": float(error.median()),
        "norm_error_spearman": metrics.spearman(norm, error),
        "trusted_share": float(scores.parts["trusted"].mean()),
        **metrics.quantiles(scores.trust, "gamma"),
    }
    return Judged(guess, y, single, norm, scores.trust, figures)
