"""The ridge solution, its error bound and the trust weight, against independent computations (PrefPaint Eqs. 3–12)."""

import math

import numpy as np
import pytest
import torch
from helpers import gaussian

from minipref import reward_model as R

T = torch.tensor
DOUBLE = torch.float64


# ------------------------------------------------------------------------------------------------ ridge


def test_ridge_solves_the_normal_equations_in_float64():
    """Ridge is least squares on data with sqrt(lam)·I stacked below: numpy solves that by other means."""
    Z, y, lam = gaussian(30, 4), gaussian(30, seed=1), 0.7
    ridge = R.ridge_fit(Z.float(), y.float(), lam)
    assert ridge.psi.dtype == DOUBLE and ridge.lam == lam
    stacked = np.vstack([Z.float().double().numpy(), math.sqrt(lam) * np.eye(4)])
    target = np.concatenate([y.float().double().numpy(), np.zeros(4)])
    expected = np.linalg.lstsq(stacked, target, rcond=None)[0]
    assert np.allclose(ridge.psi.numpy(), expected, atol=1e-12)
    assert torch.allclose(ridge(Z[:3]), Z[:3] @ T(expected), atol=1e-12)


def test_V_is_the_gram_matrix_plus_the_penalty():
    Z = gaussian(30, 4)
    ridge = R.ridge_fit(Z, gaussian(30), 0.7)
    V = sum(torch.outer(z, z) for z in Z) + 0.7 * torch.eye(4, dtype=DOUBLE)
    assert torch.allclose(ridge.V_cholesky @ ridge.V_cholesky.T, V, atol=1e-12)
    assert torch.equal(ridge.V_cholesky, ridge.V_cholesky.tril())


def test_the_theorems_norm_and_the_papers_printed_norm():
    Z, z = gaussian(30, 4), gaussian(6, 4, seed=3)
    ridge = R.ridge_fit(Z, gaussian(30), 0.7)
    inverse = torch.from_numpy(np.linalg.inv((Z.T @ Z).numpy() + 0.7 * np.eye(4)))
    for kind, expected in (
        ("theorem", [math.sqrt(float(v @ inverse @ v)) for v in z]),
        ("paper", [float((v @ inverse).square().sum().sqrt()) for v in z]),
    ):
        assert ridge.norm(z, kind).tolist() == pytest.approx(expected, rel=1e-10)
    assert torch.equal(ridge.norm(z), ridge.norm(z, "theorem"))
    with pytest.raises(ValueError, match="choose theorem or paper"):
        ridge.norm(z, "other")
    with pytest.raises(ValueError, match=r"\(6, 3\), expected \(B, 4\)"):
        ridge.norm(z[:, :3])


def test_the_error_is_the_identity_of_equation_five_and_obeys_equation_seven():
    """psi_hat − psi_* = V⁻¹Zᵀnoise − lam V⁻¹ psi_*, and |zᵀ(psi_hat − psi_*)| ≤ ‖z‖(‖Zᵀnoise‖ + sqrt(lam)‖psi_*‖)."""
    Z, psi, noise, lam = gaussian(30, 4), gaussian(4, seed=1), gaussian(30, seed=2), 0.7
    ridge = R.ridge_fit(Z, Z @ psi + noise, lam)
    V = Z.T @ Z + lam * torch.eye(4, dtype=DOUBLE)
    error = ridge.psi - psi
    assert torch.allclose(error, torch.linalg.solve(V, Z.T @ noise - lam * psi), atol=1e-10)
    s = (Z.T @ noise)[None]
    for z in gaussian(200, 4, seed=5):
        bound = ridge.norm(z[None]) * (ridge.norm(s) + math.sqrt(lam) * psi.norm())
        assert abs(z @ error) <= bound + 1e-12


def test_the_papers_printed_norm_is_no_bound():
    """A direction that the data know well, seen through a large V: ‖zᵀV⁻¹‖ shrinks twice as fast as the error."""
    Z = torch.full((100, 1), 10.0, dtype=DOUBLE)
    psi, noise = T([1.0], dtype=DOUBLE), torch.ones(100, dtype=DOUBLE)
    ridge = R.ridge_fit(Z, Z @ psi + noise, 1.0)
    z, s = torch.ones(1, 1, dtype=DOUBLE), (Z.T @ noise)[None]
    error = abs(float(ridge(z)) - float(z @ psi))
    assert error <= float(ridge.norm(z) * (ridge.norm(s) + psi.norm())) + 1e-12
    assert error > float(ridge.norm(z, "paper") * (ridge.norm(s, "paper") + psi.norm()))


def test_the_determinants_are_those_of_an_independent_computation():
    Z = gaussian(30, 4)
    ridge = R.ridge_fit(Z, gaussian(30), 0.7)
    eigenvalues = np.linalg.eigvalsh((Z.T @ Z).numpy())
    assert ridge.log_det_ratio() == pytest.approx(sum(math.log(1 + e / 0.7) for e in eigenvalues), rel=1e-10)


def test_bound_factor_is_equation_eight_by_hand():
    """One feature of 1, three samples, lam 1: det(V)/det(lam I) = 4; s·sqrt(2 log(2/delta)) + psi_norm."""
    ridge = R.ridge_fit(torch.ones(3, 1), torch.zeros(3), 1.0)
    assert ridge.bound_factor(0.1, 0.5, 2.0) == pytest.approx(0.5 * math.sqrt(2 * math.log(20)) + 2.0)
    four = R.ridge_fit(torch.ones(3, 1), torch.zeros(3), 4.0)  # det ratio 7/4, sqrt(lam) = 2
    assert four.bound_factor(0.1, 0.5, 2.0) == pytest.approx(0.5 * math.sqrt(math.log(7 / 4) + 2 * math.log(10)) + 4.0)
    z = T([[3.0]])
    assert ridge.bound(z, 0.1, 0.5, 2.0).item() == pytest.approx(ridge.bound_factor(0.1, 0.5, 2.0) * 1.5)
    for delta in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            ridge.bound_factor(delta, 0.5, 2.0)


def test_the_martingale_identity_behind_the_bound():
    """E[(det(lam I)/det V)^½ exp(‖Zᵀnoise‖²_V⁻¹ / (2 s²))] = 1 for Gaussian noise of scale s (Abbasi-Yadkori et al.).

    Every eigenvalue of ZᵀZ lies below lam, so the variance is finite. 200,000 draws; 6 standard errors: 2e-9."""
    Z, lam, s = gaussian(8, 3) * 0.2, 1.0, 0.7
    ridge = R.ridge_fit(Z, gaussian(8), lam)
    assert torch.linalg.eigvalsh(Z.T @ Z).max() < lam / 2
    noise = s * gaussian(200_000, 8, seed=9)
    value = torch.exp(ridge.norm(noise @ Z).square() / (2 * s**2) - ridge.log_det_ratio() / 2)
    assert abs(value.mean().item() - 1) < 6 * value.std().item() / math.sqrt(len(value)) < 0.02


@pytest.mark.parametrize("delta", [0.5, 0.1, 0.01])
def test_the_fitted_last_layer_leaves_its_ellipsoid_at_most_delta_of_the_time(delta):
    """Violation is ‖psi_hat − psi_*‖_V > C_bound (Eqs. 5–9); 2,000 repetitions of Gaussian noise on fixed features.

    Were the true rate delta, the measured one would exceed it by 6 standard errors with probability below 1e-8; it is
    far below (the bound is loose), so this can fail only where the bound is wrong by a large factor. The identity below
    is the sharp test."""
    Z, psi, lam, s, n = gaussian(40, 3), T([1.0, -2.0, 0.5], dtype=DOUBLE), 0.5, 0.8, 2000
    V = Z.T @ Z + lam * torch.eye(3, dtype=DOUBLE)
    factor = R.ridge_fit(Z, Z @ psi, lam).bound_factor(delta, s, float(psi.norm()))
    violated = 0
    for noise in s * gaussian(n, 40, seed=11):
        error = R.ridge_fit(Z, Z @ psi + noise, lam).psi - psi
        violated += float((error @ V @ error).sqrt()) > factor
    assert violated / n <= delta + 6 * math.sqrt(delta * (1 - delta) / n)


def test_how_loose_the_bound_is():
    """With 3 features and delta 0.1 the median bound is several times the median error: measured, not hidden."""
    Z, psi, lam, s = gaussian(200, 3), gaussian(3, seed=1), 0.5, 0.8
    z, ratios = gaussian(50, 3, seed=2), []
    for noise in s * gaussian(50, 200, seed=3):
        ridge = R.ridge_fit(Z, Z @ psi + noise, lam)
        error = (ridge(z) - z @ psi).abs()
        ratios.append(float(ridge.bound(z, 0.1, s, float(psi.norm())).median() / error.median()))
    assert 3 < np.median(ratios) < 15


def test_heavy_tailed_noise_breaks_the_assumption_that_the_bound_needs():
    """Student's t with 1.5 degrees of freedom has no variance, so no sub-Gaussian scale describes it.

    With the scale that most of its draws suggest (1.4826 times the median absolute deviation) and delta 0.01, the
    ellipsoid is left in over 10 % of 500 repetitions."""
    Z, psi, lam = gaussian(40, 3), T([1.0, -2.0, 0.5], dtype=DOUBLE), 0.5
    V = Z.T @ Z + lam * torch.eye(3, dtype=DOUBLE)
    noise = torch.from_numpy(np.random.default_rng(0).standard_t(1.5, (500, 40)))
    scale = 1.4826 * float(noise.abs().median())
    factor = R.ridge_fit(Z, Z @ psi, lam).bound_factor(0.01, scale, float(psi.norm()))
    errors = torch.stack([R.ridge_fit(Z, Z @ psi + e, lam).psi - psi for e in noise])
    violated = ((errors @ V * errors).sum(1).sqrt() > factor).double().mean()
    assert violated > 0.1


@pytest.mark.parametrize("count", [30, 70])
def test_the_noise_of_pure_noise_is_found_from_the_residuals(count):
    """Labels of pure noise of scale 1.5 on 20 features: s² is unbiased, E‖(I − H)e‖² = s²·trace((I − H)²), even where
    there are hardly more ratings than features. 4,000 repetitions; six standard errors: 2e-9."""
    Z = gaussian(count, 20)
    squares = []
    for e in 1.5 * gaussian(4000, count, seed=5):
        squares.append(R.ridge_fit(Z, e, 2.0).noise_from_residuals(Z, e) ** 2)
    assert abs(np.mean(squares) - 1.5**2) < 6 * np.std(squares) / 4000**0.5 < 0.25
    H = Z @ torch.linalg.inv(Z.T @ Z + 2.0 * torch.eye(20, dtype=DOUBLE)) @ Z.T
    M, e = torch.eye(count, dtype=DOUBLE) - H, gaussian(count, seed=9)
    exact = math.sqrt(float((M @ e).square().sum() / (M @ M).trace()))
    assert R.ridge_fit(Z, e, 2.0).noise_from_residuals(Z, e) == pytest.approx(exact, rel=1e-10)


def test_left_out_norms_are_those_of_a_V_without_the_row():
    Z, lam = gaussian(12, 4), 0.7
    ridge = R.ridge_fit(Z, gaussian(12), lam)
    left_out = ridge.left_out_norm(ridge.norm(Z))
    for i in range(12):
        rest = torch.cat([Z[:i], Z[i + 1 :]])
        V = rest.T @ rest + lam * torch.eye(4, dtype=DOUBLE)
        assert left_out[i].item() == pytest.approx(math.sqrt(float(Z[i] @ torch.linalg.inv(V) @ Z[i])), rel=1e-9)


def test_fresh_features_look_as_trusted_as_left_out_ones():
    """64 features from 100 samples: against in-sample norms nearly every fresh sample would look strange."""
    ridge = R.ridge_fit(gaussian(100, 64), gaussian(100), 0.01)
    own, fresh = ridge.norm(gaussian(100, 64)), ridge.norm(gaussian(1000, 64, seed=7))
    assert (fresh < own.quantile(0.99)).double().mean() < 0.05
    assert (fresh < ridge.left_out_norm(own).quantile(0.99)).double().mean() > 0.9


def test_ridge_stays_finite_on_rank_deficient_and_ill_conditioned_features():
    z = gaussian(50, 1)
    extreme = [z.repeat(1, 6), torch.zeros(50, 6, dtype=DOUBLE), z * 10.0 ** torch.arange(-6, 6, 2, dtype=DOUBLE)]
    for Z in (*extreme, 1e7 * z.repeat(1, 6)):
        ridge = R.ridge_fit(Z, gaussian(50, seed=1), 0.01)
        assert torch.isfinite(ridge.psi).all() and torch.isfinite(ridge.norm(gaussian(3, 6))).all()
        assert math.isfinite(ridge.log_det_ratio())


def test_the_noise_from_residuals_does_not_suffer_from_badly_scaled_features():
    """1,900 labels of scale 1 that have nothing to do with features of rank 8: 6 standard errors are 0.1, 2e-9."""
    z = gaussian(1900, 8) @ gaussian(8, 64, seed=1)
    for scale in (1.0, 1e3, 1e6):
        y = gaussian(1900, seed=2)
        assert abs(R.ridge_fit(scale * z, y, 1e-6).noise_from_residuals(scale * z, y) - 1) < 0.1


def test_ridge_refuses_what_it_cannot_solve():
    with pytest.raises(ValueError, match=r"\(5, 2\) and y \(4,\)"):
        R.ridge_fit(gaussian(5, 2), gaussian(4), 1.0)
    with pytest.raises(ValueError, match="lam=0"):
        R.ridge_fit(gaussian(5, 2), gaussian(5), 0)
    for where in ("features", "labels"):  # a single number spoils it
        Z, y = gaussian(5, 2), gaussian(5)
        (Z if where == "features" else y).view(-1)[0] = math.nan
        with pytest.raises(ValueError, match="not finite; the features have diverged"):
            R.ridge_fit(Z, y, 1.0)


# ------------------------------------------------------------------------------------------------ trust


def test_trust_weight_is_equation_eleven_with_its_clamp():
    norm = T([0.0, 10.0, 40.0], dtype=DOUBLE)
    gamma = R.trust_weight(norm, 0.05, 0.7)
    assert gamma.tolist() == pytest.approx([math.exp(0.7), math.exp(0.2), math.exp(-1.3)])
    assert R.trust_weight(T([200.0]), 0.05, 0.7).item() == pytest.approx(math.exp(-9.3))  # no clamp unless asked for
    assert R.trust_weight(norm, 0.05, 0.7, 1.0, 1.5).tolist() == pytest.approx([1.5, math.exp(0.2), 1.0])


def test_default_trust_is_one_at_the_median_and_half_at_the_95th_percentile():
    norms = torch.arange(101, dtype=DOUBLE) / 10  # median 5, 95th percentile 9.5
    k, b = R.trust_from_quantiles(norms)
    assert R.trust_weight(T([5.0, 9.5]), k, b).tolist() == pytest.approx([1.0, 0.5])
    k, b = R.trust_from_quantiles(torch.ones(5))  # no spread says nothing: everything counts alike
    assert R.trust_weight(T([0.5, 1.0, 3.0], dtype=DOUBLE), k, b).tolist() == [1.0, 1.0, 1.0]
    assert R.trust_from_quantiles(torch.zeros(5)) == (0, 0)
    for part, told_apart in ((0.9e-6, False), (1.1e-6, True)):  # (95 % − median)/median: rounding, or a spread
        spread = 100 * part / 0.45
        assert (R.trust_from_quantiles(T([100.0, 100.0 + spread], dtype=DOUBLE))[0] > 0) == told_apart
