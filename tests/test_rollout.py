"""Guidance and whole rollouts: what they cost, what they keep, and the distribution that they sample from."""

import math

import pytest
import torch
from helpers import condition, schedule, step_mean

from minipref.diffusion import STREAMS, Condition, ddim_step, predict, replay, rollout, sample_generators

# ------------------------------------------------------------------------------------------------ guidance


class Counting(torch.nn.Module):
    """Predicts from the text alone and counts the samples that it was asked for."""

    def __init__(self):
        super().__init__()
        self.samples = 0

    def forward(self, x, t, context):
        self.samples += len(x)
        return x[:, :1] * 0 + context.mean((1, 2))[:, None, None, None] + 0.001 * t[:, None, None, None]


def test_without_a_word_there_is_no_guidance_and_full_noise():
    text, empty, unet = torch.ones(2, 2, 3), torch.zeros(2, 2, 3), Counting()
    predict(unet, torch.zeros(2, 1, 2, 2), 7, condition(2, context=text, empty=empty))
    assert unet.samples == 2
    kw, c = {"shape": (1, 2, 2), "steps": 3}, condition(2, context=text, empty=empty)
    plain = rollout(unet, schedule(), c, generator=sample_generators(0, 0, [0, 1]), **kw)
    said = rollout(unet, schedule(), c, generator=sample_generators(0, 0, [0, 1]), eta=1.0, guidance=1.0, **kw)
    assert torch.equal(plain.latents, said.latents)


def test_guidance_extrapolates_from_the_empty_text():
    text, empty = torch.ones(2, 2, 3), torch.full((2, 2, 3), 0.25)
    out = predict(Counting(), torch.zeros(2, 1, 2, 2), 7, condition(2, context=text, empty=empty), guidance=3.0)
    assert torch.allclose(out, torch.full_like(out, 0.25 + 3.0 * (1 - 0.25) + 0.007))


@pytest.mark.parametrize(
    "guidance,text,calls", [(1.0, 1.0, 2), (5.0, 0.0, 2), (5.0, 1.0, 4)], ids=["scale 1", "equal prompts", "needed"]
)
def test_guidance_that_changes_nothing_costs_one_call(guidance, text, calls):
    unet, empty = Counting(), torch.zeros(2, 2, 3)
    both = condition(2, context=torch.full((2, 2, 3), text), empty=empty)
    out = predict(unet, torch.zeros(2, 1, 2, 2), 0, both, guidance=guidance)
    assert unet.samples == calls
    assert torch.allclose(out, torch.full_like(out, guidance * text))


def test_equal_prompts_make_half_the_calls_and_the_same_numbers():
    """PrefPaint's released loop guides between two identical empty prompts: twice the cost, no effect."""
    empty = torch.zeros(2, 2, 3)
    kw = {"shape": (1, 2, 2), "steps": 4, "eta": 1.0}
    plain, guided = Counting(), Counting()
    a = rollout(plain, schedule(), condition(2, context=empty), generator=sample_generators(0, 0, [0, 1]), **kw)
    b = rollout(
        guided, schedule(), condition(2, context=empty, empty=empty), guidance=7.5,
        generator=sample_generators(0, 0, [0, 1]), **kw,
    )  # fmt: skip
    assert torch.equal(a.latents, b.latents) and plain.samples == guided.samples == 2 * 4


def test_a_rollout_is_guided_where_guidance_matters():
    text, empty = torch.ones(2, 2, 3), torch.zeros(2, 2, 3)
    kw = {"shape": (1, 2, 2), "steps": 4}
    unet, wide = Counting(), condition(2, context=3 * text)  # empty + 3·(text − empty)
    c = condition(2, context=text, empty=empty)
    guided = rollout(unet, schedule(), c, generator=sample_generators(0, 0, [0, 1]), guidance=3.0, **kw)
    direct = rollout(Counting(), schedule(), wide, generator=sample_generators(0, 0, [0, 1]), **kw)
    assert unet.samples == 2 * 2 * 4 and torch.allclose(guided.latents, direct.latents, atol=1e-3)


def test_inpainting_input_is_noisy_latent_then_mask_then_masked_picture():
    x, m, p = (torch.full((1, c, 2, 2), float(v)) for c, v in ((2, 1), (1, 2), (2, 3)))
    c = Condition(torch.zeros(1, 1, 1), mask=m, masked=p)
    assert c.unet_input(x)[0, :, 0, 0].tolist() == [1, 1, 2, 3, 3]
    assert torch.equal(condition(1).unet_input(x), x)


def test_samples_can_be_selected_from_a_condition_with_all_that_belongs_to_them():
    text, m = torch.randn(3, 2, 4), torch.randn(3, 1, 2, 2)
    c = Condition(text, mask=m, masked=2 * m, empty=-text)
    part = c[torch.tensor([2, 0])]
    assert len(c) == 3 and len(part) == 2 and torch.equal(part.context, text[[2, 0]])
    assert torch.equal(part.mask, m[[2, 0]]) and torch.equal(part.masked, 2 * m[[2, 0]])
    assert torch.equal(part.empty, -text[[2, 0]]) and condition(2)[:1].mask is None
    one = Condition(text[:1].expand(3, -1, -1), mask=m, empty=-text)  # one text for all
    for index in (torch.tensor([2, 0, 1, 0]), torch.tensor([False, True, True]), slice(0, 2), [1, 2]):
        few = one[index]
        assert torch.equal(few.mask, m[index]) and torch.equal(few.empty, -text[index]) and few.masked is None
        assert torch.equal(few.context, text[:1].repeat(len(m[index]), 1, 1))
        assert few.context.stride(0) == 0 or isinstance(index, list)  # still one text, read once


# ------------------------------------------------------------------------------------------------ rollouts


class Linear(torch.nn.Module):
    """The exact epsilon predictor of Gaussian data x_0 ~ N(mu, s²): everything about its samples is known."""

    def __init__(self, s, mu, std):
        super().__init__()
        self.s, self.mu, self.std = s, mu, std

    def forward(self, x, t, context):
        a = self.s.abar_at(t).to(x)[:, None, None, None]
        return (1 - a).sqrt() * (x - a.sqrt() * self.mu) / (a * self.std**2 + 1 - a)


def exact_moments(s, mu, std, steps, eta):
    """Mean and standard deviation of the samples by propagating them through every affine step in float64."""
    times = s.timesteps(steps).tolist()
    m, v = 0.0, 1.0
    for t, p in zip(times, times[1:] + [-1]):
        a, ap = s.abar[t].item(), (s.abar[p].item() if p >= 0 else s.final_abar.item())
        slope, offset = (
            math.sqrt(1 - a) / (a * std**2 + 1 - a),
            -math.sqrt(1 - a) * math.sqrt(a) * mu / (a * std**2 + 1 - a),
        )
        sigma2 = eta**2 * (1 - ap) / (1 - a) * (1 - a / ap)
        c0, ce = math.sqrt(ap), math.sqrt(1 - ap - sigma2)
        k = c0 / math.sqrt(a) + (ce - c0 * math.sqrt(1 - a) / math.sqrt(a)) * slope
        d = (ce - c0 * math.sqrt(1 - a) / math.sqrt(a)) * offset
        m, v = k * m + d, k**2 * v + sigma2
    return m, math.sqrt(v)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_of_a_linear_gaussian_model_have_the_exact_mean_and_variance(eta):
    s, mu, std, count = schedule(prediction_type="epsilon"), 0.7, 0.4, 8000
    trajectory = rollout(
        Linear(s, mu, std), s, condition(count), shape=(1, 1, 4), steps=12, eta=eta,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    x = trajectory.latents[:, -1].double().flatten()
    m, sd = exact_moments(s, mu, std, 12, eta)
    n = len(x)  # bounds of 5.5 standard errors: false alarm below 1e-7 for each
    assert abs(x.mean().item() - m) < 5.5 * sd / math.sqrt(n)
    assert abs(x.std().item() - sd) < 5.5 * sd / math.sqrt(2 * n)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_of_correlated_gaussian_data_have_the_exact_covariance(eta):
    """x_0 ~ N(mu, A) in two dimensions: each step is affine, so mean and covariance follow in closed form.

    20,000 samples; each entry within 6 standard errors (false alarm 2e-9 each), samples uncorrelated with their
    neighbours."""
    s, count = schedule(prediction_type="epsilon"), 20_000
    mu, A = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)

    def gain(a):  # eps_theta = gain(a) (x − sqrt(a) mu), the posterior mean of the noise
        return math.sqrt(1 - a) * torch.linalg.inv(a * A + (1 - a) * eye)

    class Net(torch.nn.Module):
        def forward(self, x, t, context):
            a = s.abar[t[0]].item()
            flat = x.flatten(1).double() - math.sqrt(a) * mu
            return (flat @ gain(a).T).view_as(x).to(x.dtype)

    mean, cov = torch.zeros(2, dtype=torch.float64), eye
    times = s.timesteps(10).tolist()
    for t, t_prev in zip(times, times[1:] + [-1]):
        a, p = s.abar[t].item(), (s.abar[t_prev].item() if t_prev >= 0 else 1.0)
        sigma2 = eta**2 * (1 - p) / (1 - a) * (1 - a / p)
        k = math.sqrt(1 - p - sigma2) - math.sqrt(p * (1 - a) / a)
        M = math.sqrt(p / a) * eye + k * gain(a)
        mean, cov = M @ mean - k * gain(a) @ mu * math.sqrt(a), M @ cov @ M.T + sigma2 * eye
    trajectory = rollout(
        Net(), s, condition(count), shape=(1, 1, 2), steps=10, eta=eta, generator=torch.Generator().manual_seed(2)
    )
    x = trajectory.latents[:, -1].flatten(1).double()
    error = (cov.diag()[:, None] * cov.diag()[None] + cov**2).div(count).sqrt()
    assert ((x.mean(0) - mean).abs() < 6 * (cov.diag() / count).sqrt()).all()
    assert ((x.T.cov() - cov).abs() < 6 * error).all() and cov[0, 1] > 10 * error[0, 1]
    centred = x - mean
    assert ((centred[1:].T @ centred[:-1] / count).abs() < 6 * (cov.diag().max() / count**0.5)).all()


def test_a_trajectory_holds_every_latent_and_the_probability_of_every_random_step():
    s = schedule(prediction_type="epsilon", timestep_spacing="trailing")
    net, generators = Linear(s, 0.0, 1.0), sample_generators(0, 1, range(3))
    trajectory = rollout(net, s, condition(3), shape=(2, 4, 4), steps=5, eta=1.0, generator=generators)
    latents, times = trajectory.latents, trajectory.timesteps
    assert latents.shape == (3, 6, 2, 4, 4) and trajectory.log_probs.shape == (3, 5)
    assert times.tolist() == s.timesteps(5).tolist() == [999, 799, 599, 399, 199]
    assert trajectory.next_timesteps.tolist() == [799, 599, 399, 199, -1]
    assert trajectory.scored.tolist() == [True] * 4 + [False]  # the last step has sigma = 0
    for i in range(4):
        out = net(latents[:, i], times[i].expand(3), None)
        step = int(times[i]), int(times[i + 1])
        _, log_prob = ddim_step(s, out, latents[:, i], *step, eta=1.0, x_prev=latents[:, i + 1])
        assert torch.allclose(log_prob, trajectory.log_probs[:, i], atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_replay_finds_the_gaussian_that_each_step_was_drawn_from(guidance):
    """Any samples and steps in any order: mean + sigma·noise is where the rollout went, and the ratio of both is 1."""
    s, net, seeds = schedule(), Counting(), sample_generators(4, 2, range(3))
    text = torch.tensor([0.5, -1.0, 2.0])[:, None, None].expand(3, 2, 3)  # a prompt of its own for each sample
    c = condition(3, context=text, empty=torch.zeros(3, 2, 3))
    kw = {"eta": 0.8, "guidance": guidance}
    trajectory = rollout(net, s, c, shape=(1, 4, 4), steps=5, generator=seeds, **kw)
    noise = torch.stack([torch.randn(6, 1, 4, 4, generator=g) for g in sample_generators(4, 2, range(3))])
    samples, steps = torch.tensor([2, 0, 1, 2, 0]), torch.tensor([3, 0, 2, 1, 1])
    log_prob, mean, sigma = replay(net, s, trajectory, c, samples, steps, **kw)
    assert mean.shape == (5, 1, 4, 4) and sigma.shape == (5, 1, 1, 1) and log_prob.shape == (5,)
    drawn = mean + sigma * noise[samples, steps + 1]
    assert torch.allclose(drawn, trajectory.latents[samples, steps + 1], atol=1e-5)
    assert torch.allclose(log_prob, trajectory.log_probs[samples, steps], atol=1e-6)
    density = torch.distributions.Normal(mean, sigma).log_prob(drawn).flatten(1).mean(1)
    assert torch.allclose(log_prob, density, atol=1e-5)


def test_steps_without_noise_are_never_scored():
    net = Linear(schedule(), 0.0, 1.0)
    still = rollout(net, schedule(), condition(1), shape=(1, 2, 2), steps=4, eta=0.0, generator=torch.Generator())
    assert not still.scored.any() and still.log_probs.isnan().all()
    tiny = rollout(
        net, schedule(set_alpha_to_one=False, timestep_spacing="leading", steps_offset=1), condition(1),
        shape=(1, 2, 2), steps=4, eta=1.0, generator=torch.Generator(),
    )  # fmt: skip
    assert (
        tiny.scored.all() and tiny.log_probs.isfinite().all()
    )  # Stable Diffusion's settings end at abar_0 < 1: even the last step is random


def test_noise_depends_on_seed_epoch_and_sample_index_alone():
    s, net = schedule(), Linear(schedule(), 0.3, 0.5)
    kw = {"shape": (1, 4, 4), "steps": 3, "eta": 1.0}
    whole = rollout(net, s, condition(6), generator=sample_generators(3, 5, range(6)), **kw).latents
    parts = [
        rollout(net, s, condition(2), generator=sample_generators(3, 5, range(i, i + 2)), **kw).latents
        for i in (0, 2, 4)
    ]
    assert torch.equal(whole, torch.cat(parts))
    first = {
        tuple(torch.randn(3, generator=sample_generators(*k)[0]).tolist())
        for k in [(0, 0, [0]), (0, 0, [1]), (0, 1, [0]), (1, 0, [0]), (0, -1, [0]), (1, 1, [1])]
    }
    assert len(first) == 6
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        rollout(net, s, condition(3), generator=sample_generators(0, 0, range(2)), **kw)


def test_a_rollout_draws_one_noise_a_step_and_one_to_start_from():
    net, spare = Linear(schedule(), 0.3, 0.5), sample_generators(1, 2, [3])[0]
    noise = torch.randn(4, 1, 4, 4, generator=spare)  # T + 1 = 4 of them
    used = sample_generators(1, 2, [3])
    trajectory = rollout(net, schedule(), condition(1), shape=(1, 4, 4), steps=3, eta=1.0, generator=used)
    latents, (t, t_prev, _) = trajectory.latents, trajectory.timesteps.tolist()
    assert torch.equal(latents[0, 0], noise[0]) and torch.equal(used[0].get_state(), spare.get_state())
    mean, sigma = step_mean(schedule(), net(latents[:, 0], torch.tensor([t]), None), latents[:, 0], t, t_prev, 1)
    assert torch.allclose(latents[:, 1], mean + sigma * noise[1], atol=1e-6)


def test_a_stream_is_a_name_for_the_numbers_that_published_figures_rest_on():
    """Curves, comparison and KL had the epochs -1 to -4, RPO's three lists of prompts -10 to -12, `evaluate` 1000 …"""
    numbers = {"curves": -1, "judge base": -2, "judge aligned": -3, "kl": -4, "sample": 0, "policies": 1}
    numbers |= {"training pictures": -10, "validation": -11, "test": -12}
    numbers |= {"evaluate opponent": 1000, "evaluate base": 2000, "evaluate aligned": 3000}
    assert numbers.keys() == STREAMS.keys()
    for name, number in numbers.items():
        by_name, by_number = (sample_generators(3, x, [5])[0].initial_seed() for x in (name, number))
        assert by_name == by_number
    with pytest.raises(KeyError):
        sample_generators(0, "curve", [0])


def test_every_sample_has_its_own_stream():
    seeds = {
        g.initial_seed() for e in (*range(14), 64, 128, 2**31, -1, -2, -64) for g in sample_generators(7, e, range(500))
    }
    assert len(seeds) == 10_000 and min(seeds) >= 0  # 63-bit seeds: two meet with probability 5e-12


def test_generators_of_neighbouring_samples_are_uncorrelated():
    """16 streams of 4,000 numbers: all 120 correlations below 6/sqrt(4000); false alarm 120·2e-9 = 2e-7."""
    x = torch.stack([torch.randn(4000, generator=g) for g in sample_generators(0, 0, range(16))])
    off = torch.corrcoef(x) - torch.eye(16)
    assert off.abs().max() < 6 / math.sqrt(4000)


def test_latents_are_stored_in_the_type_asked_for_and_fed_on_as_stored():
    s, net = schedule(), Linear(schedule(), 0.0, 1.0)
    trajectory = rollout(
        net, s, condition(2), shape=(1, 4, 4), steps=4, eta=1.0, generator=torch.Generator(), dtype=torch.float16
    )
    latents, (t, t_prev) = trajectory.latents, trajectory.timesteps[1:3].tolist()
    assert latents.dtype == torch.float16 and trajectory.log_probs.dtype == torch.float32
    out = net(latents[:, 1], torch.full((2,), t), None)
    _, log_prob = ddim_step(s, out, latents[:, 1], t, t_prev, eta=1.0, x_prev=latents[:, 2])
    assert torch.equal(log_prob, trajectory.log_probs[:, 1])
