"""The policy gradient of PrefPaint (Eqs. 1, 12) and its parts, by hand, by finite differences and by Monte Carlo."""

import math
import sys

import pytest
import torch
from helpers import step_mean

from minipref import losses
from minipref.diffusion import Schedule, ScheduleConfig, gaussian_log_prob
from minipref.kernels import preference_loss_from_predictions
from minipref.losses import advantages, bradley_terry_loss, clipped_surrogate, denoising_loss, gaussian_kl

N = 100  # dimensions in these examples
T = torch.tensor


def surrogate(log_ratio, advantage, gamma=None, clip_range=1.0):
    """clipped_surrogate of given joint log-ratios (n times the mean difference)."""
    log_prob = T(log_ratio, dtype=torch.float64) / N
    gamma = None if gamma is None else T(gamma, dtype=torch.float64)
    advantage = T(advantage, dtype=torch.float64)
    return clipped_surrogate(log_prob, torch.zeros_like(log_prob), advantage, clip_range=clip_range, n=N, gamma=gamma)


def test_denoising_loss_is_the_mean_square_per_sample():
    a, b = T([[[1.0, 2.0]], [[0.0, 5.0]]]), T([[[3.0, 1.0]], [[4.0, -1.0]]])
    assert denoising_loss(a, b).tolist() == [2.5, 26.0]  # (4 + 1)/2, (16 + 36)/2
    with pytest.raises(ValueError, match="shapes differ"):
        denoising_loss(a, b[:1])


def test_the_losses_of_pairs_are_the_fused_forms_own_specification():
    """One definition: what the kernel is judged against is what the papers' file offers."""
    kernel = sys.modules[preference_loss_from_predictions.__module__]
    for name in ("denoising_loss", "preference_margin", "preference_loss", "same_shape"):
        assert getattr(losses, name) is getattr(kernel, name)


# ------------------------------------------------------------------------------------------------ advantages


def test_advantage_is_centred_by_prompt_and_scaled_by_the_batch():
    """Groups {1, 3} and {10, 14}: centred −1, 1, −2, 2; root mean square sqrt(10/4)."""
    a = advantages(T([1.0, 10.0, 3.0, 14.0]), T([0, 1, 0, 1]))
    assert a.tolist() == pytest.approx([x / math.sqrt(2.5) for x in (-1, -2, 1, 2)], rel=1e-5)


def test_a_prompt_that_is_worth_more_gains_nothing_by_it():
    g = torch.arange(4).repeat_interleave(3)
    r = torch.randn(12)
    assert torch.allclose(advantages(r, g), advantages(r + 100 * g, g), atol=1e-3)
    assert advantages(r, g).view(4, 3).sum(1).abs().max() < 1e-5


def test_one_sample_a_prompt_falls_back_to_the_mean_of_the_batch():
    a = advantages(T([1.0, 2.0, 6.0]), T([7, 8, 9]))
    assert a.tolist() == pytest.approx([x / math.sqrt(14 / 3) for x in (-2, -1, 3)], rel=1e-5)


def test_a_prompt_with_one_sample_among_others_says_nothing():
    a = advantages(T([1.0, 3.0, 50.0]), T([0, 0, 1]))
    assert a.tolist() == pytest.approx([-(1.5**0.5), 1.5**0.5, 0.0], rel=1e-5)


def test_advantages_are_clamped_and_equal_rewards_give_none():
    r = torch.zeros(300)
    r[0] = 1.0
    a = advantages(r, torch.zeros(300, dtype=torch.int64))
    assert a.max().item() == 10.0  # sqrt(299) = 17 before the clamp of PrefPaint's code
    assert advantages(-r, torch.zeros(300, dtype=torch.int64)).min().item() == -10.0
    assert advantages(r, torch.zeros(300, dtype=torch.int64), clip=2.0).max().item() == 2.0
    assert advantages(torch.full((4,), 3.0), T([0, 0, 1, 1])).tolist() == [0, 0, 0, 0]


def test_eps_keeps_tiny_spreads_from_exploding():
    a = advantages(T([0.0, 2e-7], dtype=torch.float64), T([0, 0]))
    assert a.tolist() == pytest.approx([-0.5, 0.5])  # 1e-7 / (1e-7 + 1e-7)


# ------------------------------------------------------------------------------------------------ clipped surrogate


def test_surrogate_is_minus_advantage_times_ratio_inside_the_clip():
    loss, ratio, silenced = surrogate([0.5, -0.5], [2.0, -3.0])
    expected = (-2.0 * math.exp(0.005) + 3.0 * math.exp(-0.005)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-12) and not silenced.any()
    assert ratio.tolist() == pytest.approx([math.exp(0.005), math.exp(-0.005)])


@pytest.mark.parametrize(
    "log_ratio,advantage,clipped",
    [(3.0, 1.0, True), (-3.0, 1.0, False), (3.0, -1.0, False), (-3.0, -1.0, True)],
    ids=["good, already likelier", "good, less likely", "bad, likelier", "bad, already less likely"],
)
def test_clipping_acts_where_the_step_already_went_far_enough(log_ratio, advantage, clipped):
    x = T([log_ratio / N], dtype=torch.float64, requires_grad=True)
    loss, ratio, silenced = clipped_surrogate(x, torch.zeros(1), T([advantage]), clip_range=1.0, n=N)
    loss.backward()
    width = 1.0 / N
    used = min(max(ratio.item(), 1 - width), 1 + width) if clipped else ratio.item()
    assert silenced.item() == clipped and loss.item() == pytest.approx(-advantage * used)
    assert (x.grad.item() == 0) == clipped
    if not clipped:
        assert x.grad.item() == pytest.approx(-advantage * ratio.item())


def test_clip_range_is_in_units_of_the_joint_log_ratio():
    """The paper's 1e-4 on the mean over 16,384 dimensions is 1.64: the same joint ratio is clipped at every size."""
    for n in (64, 768, 16_384):
        for joint, clipped in ((1.6, False), (1.7, True)):
            x = T([joint / n], dtype=torch.float64)
            _, _, silenced = clipped_surrogate(x, torch.zeros(1), T([1.0]), clip_range=1.64, n=n)
            assert silenced.item() == (clipped and math.exp(joint / n) > 1 + 1.64 / n)


def test_trust_multiplies_each_samples_gradient():
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    gamma, a = T([2.0, 0.5, 0.0]), T([1.0, -1.0, 5.0])
    loss, _, _ = clipped_surrogate(x, torch.zeros(3), a, clip_range=1.0, n=N, gamma=gamma)
    loss.backward()
    assert x.grad.tolist() == pytest.approx([-2.0 / 3, 0.5 / 3, 0.0])
    plain, _, _ = surrogate([0.0] * 3, [1.0, -1.0, 5.0])
    ones, _, _ = surrogate([0.0] * 3, [1.0, -1.0, 5.0], gamma=[1.0] * 3)
    assert plain.item() == ones.item() == pytest.approx(-5 / 3)


def test_surrogate_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="shapes differ"):
        clipped_surrogate(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1), clip_range=1.0, n=N)


# ------------------------------------------------------------------------------------------------ KL


def test_kl_of_two_gaussians_against_the_textbook():
    p = torch.distributions.Normal(torch.randn(2, 3, 4, dtype=torch.float64), 0.3)
    q = torch.distributions.Normal(torch.randn(2, 3, 4, dtype=torch.float64), 0.3)
    expected = torch.distributions.kl_divergence(p, q).flatten(1).sum(1)
    assert torch.allclose(gaussian_kl(p.mean, q.mean, T(0.3, dtype=torch.float64)), expected)
    with pytest.raises(ValueError, match="shapes differ"):
        gaussian_kl(p.mean, q.mean[:1], T(0.3))


def test_kl_against_monte_carlo():
    """E_p[log p − log q] over 200,000 draws; 6 standard errors, false alarm 2e-9."""
    g = torch.Generator().manual_seed(0)
    mean, ref, sigma = (torch.randn(1, 5, generator=g, dtype=torch.float64) for _ in range(3))
    sigma = T(0.8, dtype=torch.float64)
    x = mean + sigma * torch.randn(200_000, 5, generator=g, dtype=torch.float64)
    p, q = (torch.distributions.Normal(m, sigma).log_prob(x).sum(1) for m in (mean, ref))
    estimate, error = (p - q).mean(), (p - q).std() / math.sqrt(len(x))
    assert abs(gaussian_kl(mean, ref, sigma).item() - estimate.item()) < 6 * error.item()


# ------------------------------------------------------------------------------------------------ the policy gradient


class TwoStep:
    """A policy of two denoising steps on two dimensions, x → theta·x: samples, densities and gradient are known."""

    def __init__(self):
        self.schedule = Schedule(ScheduleConfig(beta_schedule="squaredcos_cap_v2"))
        self.times = [(900, 600), (600, 200)]

    def log_prob(self, theta, trajectory):
        total = 0.0
        for i, (t, t_prev) in enumerate(self.times):
            mean, sigma = step_mean(self.schedule, theta[i] * trajectory[:, i], trajectory[:, i], t, t_prev, 1.0)
            total = total + gaussian_log_prob(trajectory[:, i + 1], mean, sigma)
        return total  # (B,), each step's mean over dimensions

    def draw(self, theta, noise):
        trajectory = [noise[:, 0]]
        for i, (t, t_prev) in enumerate(self.times):
            mean, sigma = step_mean(self.schedule, theta[i] * trajectory[-1], trajectory[-1], t, t_prev, 1.0)
            trajectory.append(mean + sigma * noise[:, i + 1])
        return torch.stack(trajectory, 1)


def reward(x):
    return -(x.flatten(1) - 0.5).square().sum(1)


def sampled(policy, theta, count, seed):
    noise = torch.randn(count, 3, 2, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise, policy.draw(theta, noise)


def test_gradient_at_ratio_one_is_reinforce():
    """Before any update the surrogate's gradient is −E[A · grad log p], term by term (DDPO's score function)."""
    policy, theta = TwoStep(), T([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    _, trajectory = sampled(policy, theta.detach(), 50, 0)
    a = reward(trajectory[:, -1])
    loss, ratio, _ = clipped_surrogate(
        policy.log_prob(theta, trajectory), policy.log_prob(theta.detach(), trajectory), a, clip_range=1.0, n=2
    )
    (gradient,) = torch.autograd.grad(loss, theta)
    (expected,) = torch.autograd.grad(-(a * policy.log_prob(theta, trajectory)).mean(), theta)
    assert torch.equal(ratio, torch.ones(50, dtype=torch.float64)) and torch.allclose(gradient, expected, atol=1e-14)


def test_reinforce_matches_finite_differences_of_the_expected_reward():
    """n·(surrogate's gradient) estimates −d E[R]/d theta. The truth: central differences with common noise, 400,000
    paths each; the two estimates differ by less than 6 of their joint standard errors (false alarm 2·2e-9)."""
    policy, theta, count, h = TwoStep(), T([0.3, -0.2], dtype=torch.float64), 400_000, 1e-4
    noise, trajectory = sampled(policy, theta, count, 1)
    shift = (trajectory[:, 1] * 0).sum()  # keeps dtype
    for i in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = h
        slope = (reward(policy.draw(theta + step, noise)[:, -1]) - reward(policy.draw(theta - step, noise)[:, -1])) / (
            2 * h
        )
        moved = theta.clone().requires_grad_(True)
        t, t_prev = policy.times[i]
        mean, sigma = step_mean(policy.schedule, moved[i] * trajectory[:, i], trajectory[:, i], t, t_prev, 1.0)
        # per-sample score of this step, by hand: (x_prev − mean)/sigma² · d mean/d theta
        unit, _ = step_mean(policy.schedule, trajectory[:, i], torch.zeros_like(trajectory[:, i]), t, t_prev, 1.0)
        score = ((trajectory[:, i + 1] - mean.detach()) / sigma**2 * unit).flatten(1).sum(1) + shift
        terms = (reward(trajectory[:, -1]) - reward(trajectory[:, -1]).mean()) * score
        error = math.sqrt(float(terms.var() + slope.var()) / count)
        assert abs(float(terms.mean() - slope.mean())) < 6 * error < abs(float(slope.mean())) / 4
        # … and the library's gradient is that score's mean over n = 2 dimensions
        moved = theta.clone().requires_grad_(True)
        a = reward(trajectory[:, -1]) - reward(trajectory[:, -1]).mean()
        loss, _, _ = clipped_surrogate(
            policy.log_prob(moved, trajectory), policy.log_prob(theta, trajectory), a, clip_range=1.0, n=2
        )
        (gradient,) = torch.autograd.grad(loss, moved)
        assert gradient[i].item() == pytest.approx(-float(terms.mean()) / 2, rel=1e-9)


def test_raising_the_probability_of_good_samples_raises_the_expected_reward():
    policy, theta = TwoStep(), T([-1.0, -1.0], dtype=torch.float64)
    start = reward(sampled(policy, theta, 20_000, 99)[1][:, -1]).mean()
    for epoch in range(20):
        _, trajectory = sampled(policy, theta, 500, epoch)
        moved = theta.clone().requires_grad_(True)
        a = advantages(reward(trajectory[:, -1]), torch.zeros(500, dtype=torch.int64))
        loss, _, _ = clipped_surrogate(
            policy.log_prob(moved, trajectory), policy.log_prob(theta, trajectory), a, clip_range=1.0, n=2
        )
        theta = (theta - 0.3 * torch.autograd.grad(loss, moved)[0]).detach()
    end = reward(sampled(policy, theta, 20_000, 99)[1][:, -1])
    assert end.mean() - start > 0.5 * start.abs()  # the same 20,000 noises before and after


# ------------------------------------------------------------------------------------------------ pairs of a prompt


def test_bradley_terry_loss_is_the_mean_over_a_prompts_pairs():
    """Prompt 0: labels 3 > 1 = 1, so two pairs; prompt 1: one pair; none across prompts."""
    scores = torch.tensor([2.0, 0.5, -1.0, 4.0, 5.0], dtype=torch.float64)
    labels, groups = torch.tensor([3.0, 1.0, 1.0, 2.0, 7.0]).double(), torch.tensor([0, 0, 0, 1, 1])
    pairs = [2.0 - 0.5, 2.0 + 1.0, 5.0 - 4.0]
    expected = sum(math.log(1 + math.exp(-d)) for d in pairs) / 3
    assert bradley_terry_loss(scores, labels, groups).item() == pytest.approx(expected, rel=1e-12)
    one = bradley_terry_loss(scores[3:], labels[3:], groups[3:])  # a single pair
    assert one.item() == pytest.approx(math.log(1 + math.exp(-1.0)), rel=1e-12)


def test_bradley_terry_loss_of_no_pair_is_nothing_and_keeps_its_gradient():
    scores = torch.zeros(3, requires_grad=True)
    loss = bradley_terry_loss(scores, torch.ones(3), torch.tensor([0, 0, 1]))
    loss.backward()
    assert loss.item() == 0 and scores.grad.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="bradley_terry_loss: shapes differ"):
        bradley_terry_loss(scores, torch.ones(2), torch.zeros(3))
