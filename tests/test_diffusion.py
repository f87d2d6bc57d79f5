"""Denoising as decisions (PrefPaint Eqs. 1–2; DDIM; DDPM). Expected values by formula in float64, or by simulation."""

import math
import sys

import pytest
import torch
from helpers import KINDS, condition, randn, schedule, step_mean
from kernel_helpers import needs_triton

from minipref.diffusion import (
    Schedule,
    ScheduleConfig,
    Trajectory,
    add_noise,
    ddim_step,
    gaussian_log_prob,
    replay,
    target,
)
from minipref.kernels import common

# ------------------------------------------------------------------------------------------------ schedules


def test_linear_schedule_ends_where_its_configuration_says():
    s = schedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    assert s.betas[0].item() == pytest.approx(1e-4) and s.betas[-1].item() == pytest.approx(0.02)
    assert s.betas[500].item() == pytest.approx(1e-4 + 500 / 999 * (0.02 - 1e-4))


def test_scaled_linear_schedule_is_linear_in_the_square_root():
    s = schedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    expected = [(0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for i in (0, 1, 400, 999)]
    assert s.betas[[0, 1, 400, 999]].tolist() == pytest.approx(expected, rel=1e-12)


def test_cosine_schedule_follows_the_squared_cosine():
    """abar_t = f((t+1)/N)/f(0) with f(u) = cos²((u + 0.008)/1.008·pi/2) (Nichol & Dhariwal 2021, Eq. 17)."""
    s = schedule()

    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 10, 500, 900):
        assert s.abar[t].item() == pytest.approx(f((t + 1) / 1000) / f(0), rel=1e-9)
    assert s.betas.max().item() == 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_abar_is_the_running_product_of_one_minus_beta(kind):
    s, product = schedule(beta_schedule=kind), 1.0
    for t in range(1000):
        product *= 1 - s.betas[t].item()
    assert s.abar[-1].item() == pytest.approx(product, rel=1e-9)
    assert s.abar.dtype == torch.float64 and (s.abar.diff() < 0).all()


def test_final_abar_is_one_or_that_of_time_zero():
    assert schedule(set_alpha_to_one=True).abar_at(torch.tensor([-1])).item() == 1
    s = schedule(set_alpha_to_one=False)
    assert s.abar_at(torch.tensor([-1])).item() == s.abar[0].item()
    assert s.abar_at(torch.tensor([0, 7])).tolist() == [s.abar[0].item(), s.abar[7].item()]


def test_the_default_schedule_is_that_of_stable_diffusion():
    """betas 0.00085 to 0.012 in the square root; epsilon; leading with offset 1; the final abar is that of time 0."""
    s = Schedule(ScheduleConfig())
    assert len(s) == 1000 and s.betas[0].item() == pytest.approx(0.00085) and s.betas[-1].item() == pytest.approx(0.012)
    assert s.betas[1].sqrt() - s.betas[0].sqrt() == pytest.approx((0.012**0.5 - 0.00085**0.5) / 999)
    assert s.timesteps(50).tolist() == list(range(981, 0, -20)) and s.abar_at(torch.tensor([-1])) == s.abar[0]
    assert s.config.prediction_type == "epsilon"


def test_timestep_spacings_are_those_of_lin_et_al():
    """Lin et al. 2023 (arXiv 2305.08891), Table 2, for ten steps of a thousand."""
    assert schedule(timestep_spacing="leading", steps_offset=0).timesteps(10).tolist() == list(range(900, -1, -100))
    assert schedule(timestep_spacing="leading", steps_offset=1).timesteps(10).tolist() == list(range(901, 0, -100))
    assert schedule(timestep_spacing="trailing").timesteps(10).tolist() == list(range(999, 98, -100))
    assert schedule(timestep_spacing="linspace").timesteps(10).tolist() == list(range(999, -1, -111))


def test_times_between_the_grid_are_rounded_to_the_nearest():
    """999·k/7 for "linspace"; 1000 − 1000·k/7, less one, for "trailing"."""
    linspace, trailing = (schedule(timestep_spacing=x) for x in ("linspace", "trailing"))
    assert linspace.timesteps(8).tolist() == [999, 856, 714, 571, 428, 285, 143, 0]
    assert trailing.timesteps(7).tolist() == [999, 856, 713, 570, 428, 285, 142]
    assert linspace.timesteps(2).tolist() == [999, 0] and linspace.timesteps(1).tolist() == [0]


def test_one_step_and_all_steps_are_allowed_and_others_refused():
    s = schedule(timestep_spacing="trailing")
    assert s.timesteps(1).tolist() == [999] and s.timesteps(1000).tolist() == list(range(999, -1, -1))
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="choose 1 to 1000"):
            s.timesteps(steps)


def test_times_beyond_the_schedule_are_refused():
    s = schedule(timestep_spacing="leading", steps_offset=1)
    assert s.timesteps(999).max() == 999
    with pytest.raises(ValueError, match="steps=1000, steps_offset=1: they begin beyond time 999"):
        s.timesteps(1000)


@pytest.mark.parametrize("field", ["beta_schedule", "prediction_type", "timestep_spacing"])
def test_an_unknown_schedule_option_is_named(field):
    with pytest.raises(ValueError, match=f"{field}='nonsense'"):
        schedule(**{field: "nonsense"}).timesteps(4)


# ------------------------------------------------------------------------------------------------ forward process


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_added_with_unit_total_variance(kind):
    s, x_0, eps = schedule(beta_schedule=kind), randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    t = torch.tensor([0, 400, 999])
    x_t = add_noise(s, x_0, eps, t)
    for i in range(3):
        a = s.abar[t[i]].item()
        assert torch.allclose(x_t[i], math.sqrt(a) * x_0[i] + math.sqrt(1 - a) * eps[i], atol=1e-12)


def test_v_is_the_time_derivative_along_the_noising_circle():
    """With sqrt(abar) = cos(phi), x_phi = cos(phi)·x_0 + sin(phi)·eps and v = d x_phi / d phi (Salimans & Ho 2022)."""
    s, x_0, eps = schedule(prediction_type="v_prediction"), randn(1, 1, 2, 2), randn(1, 1, 2, 2, seed=1)
    phi, h = math.acos(math.sqrt(s.abar[300].item())), 1e-6
    around = [(math.cos(a), math.sin(a)) for a in (phi + h, phi - h)]
    derivative = ((around[0][0] - around[1][0]) * x_0 + (around[0][1] - around[1][1]) * eps) / (2 * h)
    assert torch.allclose(target(s, x_0, eps, torch.tensor([300])), derivative, atol=1e-8)
    assert torch.equal(target(schedule(prediction_type="epsilon"), x_0, eps, torch.tensor([300])), eps)


def test_shapes_that_do_not_fit_are_refused_with_both_shapes():
    s, x = schedule(), randn(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\).*\(2, 1, 4, 5\)"):
        add_noise(s, x, randn(2, 1, 4, 5), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"model_output is \(1, 1, 4, 4\) but x_t is \(2, 1, 4, 4\)"):
        ddim_step(s, x[:1], x, 500, 400, eta=1, noise=x)
    for name in ("x_prev", "noise"):
        with pytest.raises(ValueError, match=name + r" is \(1, 1, 4, 4\) but x_t is \(2, 1, 4, 4\)"):
            ddim_step(s, x, x, 500, 400, eta=1, **{name: x[:1]})
    for both in ({}, {"noise": x, "x_prev": x}):
        with pytest.raises(ValueError, match="either noise"):
            ddim_step(s, x, x, 500, 400, eta=1, **both)


# ------------------------------------------------------------------------------------------------ one step


def replayed(s, output, x_t, x_prev, times, eta):
    """`replay` of one step of a batch, with a network that gives `output`: log-probabilities, means, sigmas."""
    trajectory = Trajectory(torch.stack([x_t, x_prev, x_prev], 1), torch.zeros(len(x_t), 2), torch.tensor(times), None)
    samples = torch.arange(len(x_t))
    return replay(lambda x, t, context: output, s, trajectory, condition(len(x_t)), samples, samples * 0, eta=eta)


def eq2(s, output, x_t, t, t_prev, eta):
    """PrefPaint Eq. 2 in plain float64 arithmetic, through x0_hat and eps_theta."""
    a = s.abar[t].item()
    p = s.abar[t_prev].item() if t_prev >= 0 else s.final_abar.item()
    if s.config.prediction_type == "epsilon":
        eps = output
        x0 = (x_t - math.sqrt(1 - a) * eps) / math.sqrt(a)
    else:
        x0 = math.sqrt(a) * x_t - math.sqrt(1 - a) * output
        eps = math.sqrt(a) * output + math.sqrt(1 - a) * x_t
    sigma2 = eta**2 * (1 - p) / (1 - a) * (1 - a / p)
    return math.sqrt(p) * x0 + math.sqrt(1 - p - sigma2) * eps, math.sqrt(sigma2)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_step_is_equation_two(prediction, kind, eta):
    s = schedule(prediction_type=prediction, beta_schedule=kind, set_alpha_to_one=False)
    x_t, out = randn(1, 2, 3, 3), randn(1, 2, 3, 3, seed=1)
    for t, t_prev in ((950, 700), (500, 499), (20, 1), (3, 0), (5, -1)):
        mean, sigma = step_mean(s, out, x_t, t, t_prev, eta)
        expected, expected_sigma = eq2(s, out, x_t, t, t_prev, eta)
        assert torch.allclose(mean, expected, rtol=1e-9, atol=1e-9)
        assert sigma.shape == (1, 1, 1, 1) and sigma.item() == pytest.approx(expected_sigma, rel=1e-9, abs=1e-12)
        for z in (0.0, 1.0):  # what is drawn without noise, and with one sigma of it
            drawn, _ = ddim_step(s, out, x_t, t, t_prev, eta=eta, noise=torch.full_like(x_t, z))
            assert torch.allclose(drawn, expected + z * expected_sigma, rtol=1e-9, atol=1e-9)


def test_times_may_differ_within_a_batch():
    s, x, out = schedule(), randn(3, 1, 2, 2), randn(3, 1, 2, 2, seed=1)
    t, t_prev = torch.tensor([900, 400, 30]), torch.tensor([700, 100, -1])
    mean, sigma = step_mean(s, out, x, t, t_prev, 1)
    drawn, log_prob = ddim_step(s, out, x, t, t_prev, eta=1, noise=torch.ones_like(x))
    for i in range(3):
        here, step = slice(i, i + 1), (int(t[i]), int(t_prev[i]))
        one, s_one = step_mean(s, out[here], x[here], *step, 1)
        assert torch.equal(mean[here], one) and torch.equal(sigma[here], s_one)
        alone = ddim_step(s, out[here], x[here], *step, eta=1, noise=torch.ones_like(x[here]))
        assert torch.equal(drawn[here], alone[0]) and torch.allclose(log_prob[here], alone[1], 0, 0, equal_nan=True)


def test_ddim_at_eta_one_is_the_posterior_of_the_ddpm():
    """q(x_{t−1} | x_t, x_0) from the product of two Gaussians: the forward step and the marginal (DDPM Eqs. 6–7)."""
    s, x_0, eps = schedule(prediction_type="epsilon"), randn(1, 1, 4, 4), randn(1, 1, 4, 4, seed=1)
    for t in (1, 50, 500, 990):
        x_t = add_noise(s, x_0, eps, torch.tensor([t]))
        alpha, p = 1 - s.betas[t].item(), s.abar[t - 1].item()
        # x_t ~ N(sqrt(alpha) x_prev, 1 − alpha), x_prev ~ N(sqrt(p) x_0, 1 − p)
        precision = alpha / (1 - alpha) + 1 / (1 - p)
        expected = (math.sqrt(alpha) * x_t / (1 - alpha) + math.sqrt(p) * x_0 / (1 - p)) / precision
        mean, sigma = step_mean(s, eps, x_t, t, t - 1, 1)
        assert torch.allclose(mean, expected, atol=1e-8)
        assert sigma.item() ** 2 == pytest.approx(1 / precision, rel=1e-8)


def test_single_precision_holds_at_the_noisiest_step():
    """Going through eps by hand in fp32 loses digits at t = 999; the float64 coefficient tables do not."""
    s = schedule(prediction_type="v_prediction")
    x, v = randn(1, 2, 4, 4), randn(1, 2, 4, 4, seed=1)
    exact, _ = eq2(s, v, x, 999, 832, 1.0)
    drawn, _ = ddim_step(s, v.float(), x.float(), 999, 832, eta=1, noise=torch.zeros(x.shape))
    for mean in (step_mean(s, v.float(), x.float(), 999, 832, 1)[0], drawn):
        assert mean.dtype == torch.float32 and (mean.double() - exact).abs().max() < 1e-6


def test_log_probability_is_the_gaussian_density_per_dimension():
    s, x_t, out, noise = schedule(), randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2)
    x_prev, log_prob = ddim_step(s, out, x_t, 800, 600, eta=0.7, noise=noise)
    mean, sigma = eq2(s, out, x_t, 800, 600, 0.7)
    density = torch.distributions.Normal(mean, sigma).log_prob(x_prev)
    assert torch.allclose(x_prev, mean + sigma * noise, atol=1e-9)
    assert log_prob.shape == (2,) and torch.allclose(log_prob, density.flatten(1).mean(1), atol=1e-10)
    again, scored = ddim_step(s, out, x_t, 800, 600, eta=0.7, x_prev=x_prev)
    assert torch.equal(again, x_prev) and torch.equal(scored, log_prob)
    found, found_mean, found_sigma = replayed(s, out, x_t, x_prev, (800, 600), eta=0.7)
    assert torch.allclose(found_mean, mean, atol=1e-9) and found_sigma.flatten().tolist() == pytest.approx([sigma] * 2)
    assert torch.equal(found, log_prob)


def test_a_step_without_noise_has_no_density():
    """sigma = 0: x_prev is the mean whatever the noise, and its log-probability is NaN, drawn or scored."""
    s, x_t, out = schedule(), randn(2, 1, 2, 2), randn(2, 1, 2, 2, seed=1)
    mean, sigma = eq2(s, out, x_t, 500, 300, 0.0)
    drawn, log_prob = ddim_step(s, out, x_t, 500, 300, eta=0, noise=torch.ones_like(x_t))
    assert sigma == 0 and torch.allclose(drawn, mean, atol=1e-9) and log_prob.isnan().all()
    for x_prev in (drawn, drawn + 1):
        assert ddim_step(s, out, x_t, 500, 300, eta=0, x_prev=x_prev)[1].isnan().all()


def test_log_probability_of_the_mean_is_that_of_the_normalising_constant():
    x, sigma = torch.zeros(1, 2, 2, 2), torch.full((1, 1, 1, 1), 0.5)
    assert gaussian_log_prob(x, x, sigma).item() == pytest.approx(
        -math.log(0.5) - 0.5 * math.log(2 * math.pi), abs=1e-6
    )
    one_off = gaussian_log_prob(x + 1, x, sigma).item() - gaussian_log_prob(x, x, sigma).item()
    assert one_off == pytest.approx(-0.5 / 0.25, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_latent_is_rounded_to_its_storage_type_before_it_is_scored(dtype):
    """Were it scored first and rounded after, a replay would find another probability."""
    s = schedule()
    x_t, out, noise = (randn(2, 3, 8, 8, seed=i, dtype=torch.float32).to(dtype) for i in range(3))
    x_prev, log_prob = ddim_step(s, out, x_t, 500, 300, eta=1, noise=noise)
    assert x_prev.dtype == dtype and log_prob.dtype == torch.float32
    _, replayed = ddim_step(s, out, x_t, 500, 300, eta=1, x_prev=x_prev)
    assert torch.equal(log_prob, replayed)


@needs_triton
def test_the_fused_step_is_the_same_step(monkeypatch):
    """The fused form in the dispatcher's place: draws, scores, gradients, mean and sigma, and where it must not run."""
    S = schedule()
    out, x_t, noise = (randn(3, 2, 4, 4, seed=i).float() for i in range(3))
    t, t_prev = torch.tensor([900, 500, 40]), torch.tensor([800, 300, 20])
    module, calls = sys.modules["minipref.kernels.ddim_step_logprob"], []

    def on_gpu(impl, *given):
        """What "auto" decides on a GPU for large latents; on a CPU the kernel runs in the interpreter."""
        assert impl == "auto"
        try:
            return common.use_triton("triton", *given)
        except RuntimeError as e:
            assert "requires a gradient that the fused form does not have" in str(e)
            return False

    true = module._ddim_step_logprob
    monkeypatch.setattr(module, "_ddim_step_logprob", lambda *a: calls.append(1) or true(*a))

    def both(function):
        results = []
        for use_triton in (lambda *_: False, on_gpu):
            monkeypatch.setattr(module, "use_triton", use_triton)
            results.append(function())
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-5), (a - b).abs().max()
        return results[1]

    x_prev, _ = both(lambda: ddim_step(S, out, x_t, t, t_prev, eta=1.0, noise=noise))
    both(lambda: ddim_step(S, out, x_t, t, t_prev, eta=0.5, x_prev=x_prev))
    log_prob, mean, sigma = both(lambda: replayed(S, out, x_t, x_prev, (900, 800), eta=1.0))
    assert mean.shape == x_t.shape and sigma.shape == (3, 1, 1, 1) and log_prob.shape == (3,)

    def slopes():
        leaf = out.clone().requires_grad_()
        first = ddim_step(S, leaf, x_t, t, t_prev, eta=1.0, x_prev=x_prev)[1]
        again = replayed(S, leaf, x_t, x_prev, (900, 800), eta=1.0)[0]
        return [*torch.autograd.grad(first.sum(), leaf), *torch.autograd.grad(again.sum(), leaf)]

    assert both(slopes)[0].abs().max() > 1e-3
    assert len(calls) == 5

    # What the fused form has no gradient for: the latent that is given, and the one that is drawn.
    def to_the_given():
        x = x_t.clone().requires_grad_()
        return torch.autograd.grad(ddim_step(S, out, x, t, t_prev, eta=1.0, x_prev=x_prev)[1].sum(), x)

    def through_the_drawn():
        model = out.clone().requires_grad_()
        drawn = ddim_step(S, model, x_t, t, t_prev, eta=1.0, noise=noise)[0]
        return torch.autograd.grad(drawn.square().sum(), model)

    both(to_the_given)
    both(through_the_drawn)
    assert len(calls) == 5
