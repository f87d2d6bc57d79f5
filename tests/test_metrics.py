"""What is measured (PrefPaint's WinRate and its intervals, correlations). Expected values by hand or by enumeration."""

import itertools
import math

import pytest
import torch

from minipref import metrics as M

T = torch.tensor


def test_win_rate_takes_the_best_of_the_samples_and_counts_ties_half():
    candidate = T([[1.0, 5.0], [0.0, 2.0], [3.0, 1.0], [0.0, 0.0]])
    base = T([4.0, 2.0, 4.0, -1.0])  # win, tie, loss, win
    assert M.win_rate(candidate, base) == (1 + 0.5 + 0 + 1) / 4
    assert M.win_rate(candidate[:, :1], base) == 1 / 4
    with pytest.raises(ValueError, match="expected"):
        M.win_rate(candidate[:, 0], base)
    with pytest.raises(ValueError, match="expected"):
        M.win_rate(candidate, base[:3])


@pytest.mark.parametrize("samples", [1, 3, 10])
def test_a_model_wins_s_of_s_plus_one_against_itself(samples):
    """100,000 prompts of continuous scores; 6 standard errors, false alarm 2e-9."""
    g = torch.Generator().manual_seed(samples)
    scores = torch.randn(100_000, samples + 1, generator=g, dtype=torch.float64)
    expected = M.self_win_rate(samples)
    assert expected == {1: 1 / 2, 3: 3 / 4, 10: 10 / 11}[samples]
    rate = M.win_rate(scores[:, 1:], scores[:, 0])
    assert abs(rate - expected) < 6 * math.sqrt(expected * (1 - expected) / 100_000)


def test_common_noise_inflates_the_win_rate():
    """A model that is a little better wins every prompt under the same noise, but hardly more than half otherwise."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2000, generator=g), torch.randn(2000, generator=g)
    assert M.win_rate((a + 0.1)[:, None], a) == 1.0
    assert M.win_rate((a + 0.1)[:, None], b) < 0.6


@pytest.mark.parametrize("rate,count", [(0.3, 10), (0.55, 512), (0.0, 7), (1.0, 7), (1.0, 1)])
def test_wilsons_interval_holds_the_shares_from_which_the_rate_is_1_96_errors_away(rate, count):
    """Its ends p solve |rate − p| = 1.96·sqrt(p(1 − p)/count): the score test inverted."""
    lo, hi = M.wilson_interval(rate, count)
    assert 0 <= lo <= rate <= hi <= 1
    for p in (lo, hi):
        if 0 < p < 1:
            assert abs(rate - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / count), rel=1e-9)
    assert (lo == 0) == (rate == 0) and (hi == 1) == (rate == 1)


def test_wilsons_interval_refuses_what_is_no_share():
    for rate, count in ((-0.1, 5), (1.1, 5), (0.5, 0)):
        with pytest.raises(ValueError, match="expected a share"):
            M.wilson_interval(rate, count)


def test_spearman_is_pearson_of_mean_ranks():
    """Ranks of x: 1, 2.5, 2.5, 4; of y: 1, 3, 2, 4. Pearson of those by hand: 4.5/sqrt(4.5·5)."""
    assert M.spearman(T([1.0, 2.0, 2.0, 9.0]), T([0.0, 5.0, 3.0, 7.0])) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    x = torch.randn(50)
    assert M.spearman(x, x**3) == pytest.approx(1) and M.spearman(x, -x.exp()) == pytest.approx(-1)
    assert math.isnan(M.spearman(x, torch.ones(50)))


def test_within_prompt_correlation_sees_only_differences_within_a_prompt():
    """Prompts differ hugely and agree; within each, x and y run against each other."""
    g = T([0, 0, 1, 1, 2, 2])
    x = T([0.0, 1.0, 100.0, 101.0, 200.0, 202.0])
    y = T([1.0, 0.0, 101.0, 100.0, 202.0, 200.0])
    assert M.spearman(x, y) > 0.7 and M.within_prompt_correlation(x, y, g) == pytest.approx(-1)
    # centred by hand: x ∓½, y ±½; then x ∓½, y ∓½: they cancel
    assert M.within_prompt_correlation(T([0.0, 1, 5, 6]), T([1.0, 0, 5, 6]), T([3, 3, 8, 8])) == pytest.approx(
        0, abs=1e-12
    )


def test_within_prompt_spread_by_hand():
    assert M.within_prompt_std(T([1.0, 3.0, 10.0, 16.0]), T([0, 0, 1, 1])) == pytest.approx(
        math.sqrt((1 + 1 + 9 + 9) / 4)
    )


def test_r_squared_by_hand():
    truth = T([1.0, 2.0, 6.0])  # mean 3, squares 4 + 1 + 9
    assert M.r_squared(truth, truth) == 1 and M.r_squared(torch.full((3,), 3.0), truth) == 0
    assert M.r_squared(T([1.0, 2.0, 8.0]), truth) == pytest.approx(1 - 4 / 14)
    assert M.r_squared(truth + 5, truth) == pytest.approx(1 - 75 / 14)  # a shift is an error


def test_diversity_is_the_mean_difference_over_the_hole_between_samples_of_a_prompt():
    images = torch.zeros(5, 3, 2, 2)
    masks = torch.zeros(5, 1, 2, 2)
    masks[..., 0, :] = 1  # hole: the upper two pixels
    images[1, :, 0, 0], images[2, 0, 0, 0] = 0.8, 0.8
    images[:, :, 1, 1] = torch.rand(5, 1)  # outside the hole: does not count
    groups = T([4, 4, 4, 7, 9])
    pairs = {(0, 1): 0.8 / 2, (0, 2): 0.8 / 6, (1, 2): 0.8 / 2 - 0.8 / 6}
    assert M.diversity(images, masks, groups) == pytest.approx(sum(pairs.values()) / 3)
    assert len(pairs) == len(list(itertools.combinations(range(3), 2)))
    assert math.isnan(M.diversity(images, masks, torch.arange(5)))


def test_quantiles_are_named_by_percent():
    q = M.quantiles(torch.arange(101.0), "norm")
    assert q == pytest.approx({"norm_q10": 10, "norm_q50": 50, "norm_q90": 90})


def test_pair_accuracy_counts_pairs_of_a_prompt_and_ties_of_the_guess_half():
    """Prompt 0: 3 > 2 right, 3 > 1 tied, 2 > 1 wrong; prompt 1: equal truth, no pair; nothing across prompts."""
    guess, truth = torch.tensor([5.0, 1.0, 5.0, 0.0, 9.0]), torch.tensor([3.0, 2.0, 1.0, 4.0, 4.0])
    assert M.pair_accuracy(guess, truth, torch.tensor([0, 0, 0, 1, 1])) == pytest.approx(1.5 / 3)
    assert M.pair_accuracy(truth, truth, torch.tensor([0, 0, 0, 1, 1])) == 1
    assert math.isnan(M.pair_accuracy(guess, truth, torch.arange(5)))


def test_students_quantiles_hold_95_percent_of_his_density():
    """Each tabulated quantile against the density itself, integrated numerically (Simpson)."""
    for df, q in enumerate(M.T_QUANTILES, start=1):
        height = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
        x = torch.linspace(-q, q, 20_001, dtype=torch.float64)
        y = height * (1 + x**2 / df) ** (-(df + 1) / 2)
        weights = torch.ones_like(x)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        assert float((weights * y).sum() * (x[1] - x[0]) / 3) == pytest.approx(0.95, abs=1e-5)


def test_students_interval_by_hand():
    low, high = M.t_interval(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))  # sd² = 2.5, df = 4
    assert (low + high) / 2 == pytest.approx(3) and (high - low) / 2 == pytest.approx(2.7764 * math.sqrt(2.5 / 5))
    assert M.t_interval(torch.tensor([0.0, 2.0])) == pytest.approx((1 - 12.7062, 1 + 12.7062))  # sd² = 2, df = 1
    many = torch.arange(100.0)
    assert M.t_interval(many)[1] - 49.5 == pytest.approx(2.0860 * float(many.std()) / 10)
    with pytest.raises(ValueError, match="at least two values"):
        M.t_interval(torch.tensor([1.0]))
