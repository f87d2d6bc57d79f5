"""Rewards: the learned one that knows how far to trust itself, small built-in ones, and yours.

    z          reward feature                                        (d,)
    Z, y       training features (N, d) and their labels (N,)
    lam        ridge penalty
    V          Zᵀ Z + lam·I                                          (d, d)
    psi_hat    V⁻¹ Zᵀ y, the last layer                              (d,)
    ‖z‖_V⁻¹    sqrt(zᵀ V⁻¹ z): how little the training data say about z
    gamma      trust weight exp(−k·‖z‖_V⁻¹ + b)

A reward is any callable `reward(images (B, 3, H, W) in [0, 1], batch: Prompts)` that returns a tensor (B,) or `Scores`.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .data import annotator
from .data.prompts import Prompts
from .models.reward_features import ClipFeatureConfig, ClipFeatures, FeatureConfig, RewardFeatures
from .runtime import checkpoint


@dataclass(frozen=True)
class Scores:
    """value (B,): the reward;  trust (B,) or None: gamma;  parts: further columns (B,) for the log."""

    value: Tensor
    trust: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)


Reward = Callable[[Tensor, Prompts], "Tensor | Scores"]
DELTA = 0.05  # the bounds of scores hold with probability 1 − DELTA, under their assumptions
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


@torch.no_grad()
def features_of(features: nn.Module, images: Tensor, batch: Prompts) -> Tensor:
    """z (B, d) on the CPU of completions (B, 3, H, W). Scoring is always done in eval mode."""
    device = next(features.parameters()).device
    parts = (x.to(device).split(SCORED_AT_ONCE) for x in (images, batch.masked, batch.masks))
    return torch.cat([features.eval()(*x) for x in zip(*parts)]).cpu()


class LearnedReward(nn.Module):
    """R(x) = <F(x), psi_hat> with its error bound and trust weight (PrefPaint Sections 3–4). Always in eval mode."""

    def __init__(self, features: Any, ridge: Ridge, calibration: Calibration):
        super().__init__()
        self.features: Any = features.eval().requires_grad_(False)
        self.ridge, self.calibration = ridge, calibration

    def train(self, mode: bool = True):
        return super().train(False)  # scores never depend on a mode

    def z(self, images: Tensor, batch: Prompts) -> Tensor:
        return features_of(self.features, images, batch)

    def forward(self, images: Tensor, batch: Prompts) -> Scores:
        """Scores whose parts are `norm`, ‖z‖_V⁻¹, `bound`, C_bound(DELTA)·norm, and `trusted`, 1 where the norm lies
        under the training norms' 99 %."""
        z, c = self.z(images, batch), self.calibration
        norm = self.ridge.norm(z)
        gamma = trust_weight(self.ridge.norm(z, c.norm_kind), c.k, c.b, c.lo, c.hi)
        parts = {"norm": norm.float(), "trusted": (norm <= c.norm_quantiles["0.99"]).float()}
        parts["bound"] = (self.bound_factor(DELTA) * norm).float()
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
            ridge = Ridge(state["psi"], state["V_cholesky"], config["lam"])
            kinds, values = TOWERS[config["tower"]], config["features"]
            calibration = Calibration(**config["calibration"])
        except (KeyError, TypeError) as e:
            raise ValueError(f"{path}: not a whole reward model ({type(e).__name__}: {e})") from None
        return LearnedReward(checkpoint.build(*kinds, values, own, path), ridge, calibration)


# ------------------------------------------------------------------------------------------------ built-in rewards


def brightness(images: Tensor, batch: Prompts) -> Tensor:
    """Mean luma (Rec. 601) of the whole picture, 0 to 1."""
    return (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1).mean((1, 2))


def jpeg_size(images: Tensor, batch: Prompts) -> Tensor:
    """Kilobytes of the picture as a JPEG of quality 95 (DDPO's incompressibility)."""
    sizes = []
    for x in (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(x)).save(buffer, "JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


def jpeg_small(images: Tensor, batch: Prompts) -> Tensor:
    """Minus `jpeg_size` (DDPO's compressibility)."""
    return -jpeg_size(images, batch)


def gold(images: Tensor, batch: Prompts) -> Tensor:
    """The toy raters' noise-free label, 1 to 7: an upper bound, never available with real people."""
    if batch.scenes is None:
        raise ValueError("gold needs the true scenes of the toy world; pictures of your own have none")
    return annotator.gold(images, batch.masks, batch.scenes).label


class ClipReward:
    """Cosine similarity to a text, or to each prompt's own text where none is given, −1 to 1."""

    def __init__(self, clip, tokenizer, text: str | None = None):
        if text and (unknown := tokenizer.unknown(text)):
            raise ValueError(f"the text {text!r} has words that the CLIP-like encoder never saw: {', '.join(unknown)}")
        self.clip, self.tokenizer, self.text = clip, tokenizer, text

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: Prompts) -> Tensor:
        texts = batch.texts if self.text is None else [self.text] * len(images)
        if not all(texts):
            raise ValueError("prompts without a text; name one: --reward 'clip:a red circle on a blue background'")
        device = self.clip.logit_scale.device
        image, text = self.clip.encode_image(images.to(device)), self.clip.encode_text(self.tokenizer(texts).to(device))
        return (image * text).sum(1).cpu()


BUILT_IN: dict[str, Reward] = {
    "brightness": brightness,
    "jpeg_size": jpeg_size,
    "jpeg_small": jpeg_small,
    "gold": gold,
}


def load_reward(name: str, learned: Callable[[], Reward], clip: Callable[[], tuple[Any, Any]]) -> Reward:
    """The reward that `--reward` names: "model" (the trained one), "model:RUN" (of a run of train_reward.py),
    "clip:TEXT", a built-in, a weighted sum such as "0.7*model+0.3*brightness", or "package.module:function"."""
    terms = [t.strip() for t in name.split("+")]
    if len(terms) > 1 or "*" in name:
        return _weighted_sum(terms, lambda n: load_reward(n, learned, clip))
    if name == "model":
        return learned()
    if name.startswith("model:"):
        path = Path(name[6:].strip())
        return LearnedReward.load(path / "reward.pt" if path.is_dir() else path)
    if name.startswith("clip:"):
        encoder, tokenizer = clip()
        return ClipReward(encoder, tokenizer, name[5:].strip())
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" not in name:
        known = ", ".join(["model", "model:RUN", "clip:TEXT", *BUILT_IN])
        raise ValueError(f"--reward {name}: unknown; choose {known}, or yours as package.module:function")
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # a script's own folder is on the path, the user's is not
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as e:  # whatever the user's module does when it is imported
        reason = f"{type(e).__name__}: {e}"
        raise ValueError(f"--reward {name}: cannot be imported ({reason}); run from the folder that holds it") from None
    if not callable(found):
        raise ValueError(f"--reward {name}: is no function")
    return found


def _weighted_sum(terms: list[str], load: Callable[[str], Reward]) -> Reward:
    parsed = []
    for term in terms:
        weight, star, rest = term.partition("*")
        try:
            factor, inner = (float(weight), rest.strip()) if star else (1.0, term)
            parsed.append((factor, CheckedReward(inner, load(inner))))
        except ValueError as e:
            raise ValueError(f"--reward term {term!r}: {e}") from None

    def total(images: Tensor, batch: Prompts) -> Scores:
        scored = [r(images, batch) for _, r in parsed]
        value = sum(w * s.value for (w, _), s in zip(parsed, scored))
        trust = next((s.trust for s in scored if s.trust is not None), None)
        parts = {k: abs(w) * v if k == "bound" else v for (w, _), s in zip(parsed, scored) for k, v in s.parts.items()}
        return Scores(value, trust, parts)  # type: ignore[arg-type]

    return total


def as_scores(result: Tensor | Scores) -> Scores:
    return result if isinstance(result, Scores) else Scores(result)


class CheckedReward:
    """A reward whose every answer is checked: shape (B,), finite numbers, and at first a difference between pictures.

    Later a constant is no fault: a reward of "solved or not" becomes one when all is solved.
    """

    def __init__(self, name: str, reward: Reward):
        self.name, self.reward, self.told_apart = name, reward, False

    def __call__(self, images: Tensor, batch: Prompts) -> Scores:
        expected = f"expected a tensor of {len(images)} finite numbers, one per picture"
        try:
            scores = as_scores(self.reward(images, batch))
        except Exception as e:
            raise ValueError(f"reward {self.name}: raised {type(e).__name__}: {e}; {expected}") from e

        def column(what: str, x: Any) -> Tensor:
            if not isinstance(x, Tensor) or x.shape != (len(images),):
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"reward {self.name}: {what} {got}; {expected}")
            if not torch.isfinite(x).all():
                raise ValueError(f"reward {self.name}: {what} NaN or infinity; {expected}")
            return x.detach().float().cpu()

        value = column("returned", scores.value)
        trust = None if scores.trust is None else column("returned a trust of", scores.trust)
        parts = {k: column(f"returned a part {k!r} of", v) for k, v in scores.parts.items()}
        if len(value) > 1 and not self.told_apart:
            self.told_apart = bool((value != value[0]).any())
        if len(value) > 1 and not self.told_apart:
            raise ValueError(
                f"reward {self.name}: gave all {len(value)} pictures the value {value[0].item():g}: nothing to learn"
            )
        return Scores(value, trust, parts)
