"""What the benchmark compares is the same computation, and the sampling loop waits for no device."""

import dataclasses
import json
import math
import re
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_rl
from minipref.commands import bench, bench_kernels, bench_lean
from minipref.diffusion import Condition, Schedule, ScheduleConfig, ddim_step, predict, rollout
from minipref.kernels import common, ddim_step_logprob
from minipref.models.unet import UNet, UNetConfig

TINY = UNetConfig(
    in_channels=9, out_channels=4, block_out_channels=(8, 16), cross_attention_dim=12, attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    norm_num_groups=4, layers_per_block=1,
)  # fmt: skip
NAMES = ["one_branch", "keep_activations", "no_waiting"]


def setting(batch=3):
    torch.manual_seed(0)
    unet = UNet(TINY)
    context, mask, masked = torch.randn(batch, 5, 12), torch.ones(batch, 1, 8, 8), torch.randn(batch, 4, 8, 8)
    return unet, Schedule(ScheduleConfig()), Condition(context, mask, masked), (4, 8, 8)


def outcome(spoil=None, **saved):
    """An iteration with these savings alone, and how many pictures the UNet has seen."""
    unet, schedule, condition, shape = setting()
    pictures = []
    unet.register_forward_pre_hook(lambda m, x: pictures.append(len(x[0])))
    savings = bench.Savings(**{**dict.fromkeys(NAMES, False), **saved})
    with pytest.MonkeyPatch.context() as patch:
        if spoil:
            true = bench.clipped_surrogate

            def spoilt(*args, **options):
                loss, *rest = true(*args, **options)
                return spoil * loss, *rest

            patch.setattr(bench, "clipped_surrogate", spoilt)
        result = bench.iteration(unet, schedule, condition, shape, savings, steps=4, train_steps=2, seed=5)
    return result, sum(pictures)


def test_no_saving_changes_what_is_computed():
    wasteful, pictures = outcome()
    # Both branches of 3 pictures: 4 steps, and 2 trained steps computed twice (checkpointing).
    assert pictures == 2 * 3 * (4 + 2 * 2)
    for saved in [{n: True} for n in NAMES] + [dict.fromkeys(NAMES, True)]:
        found, seen = outcome(**saved)
        assert found.difference(wasteful) <= 1e-5
        assert seen == (1 if "one_branch" in saved else 2) * 3 * (4 + 2 * (1 if "keep_activations" in saved else 2))


def test_the_comparison_would_notice():
    """A loss of another scale, and none at all."""
    wasteful = outcome()[0]
    assert outcome(spoil=1.01)[0].difference(wasteful) > 1e-3 and outcome(spoil=1e-9)[0].difference(wasteful) > 0.9


def test_an_iteration_is_the_loops_own_rollout_and_one_update_of_what_it_replays():
    """Latents and log-probabilities are those of `rollout`; the gradient is the surrogate's, by hand (ratio 1)."""
    unet, schedule, condition, shape = setting()
    before = [p.detach().clone() for p in unet.parameters()]
    g = torch.Generator().manual_seed(5)
    trajectory = rollout(unet, schedule, condition, shape=shape, steps=4, generator=g)
    last = trajectory.latents[:, -1].flatten(1).mean(1)
    centred = last - last.mean()
    advantage = centred / centred.square().mean().sqrt()
    loss = 0.0
    for i in range(2):
        t, t_prev = trajectory.timesteps[i : i + 2].tolist()
        output = predict(unet, trajectory.latents[:, i], t, condition)
        _, log_prob = ddim_step(
            schedule, output, trajectory.latents[:, i], t, t_prev, eta=1.0, x_prev=trajectory.latents[:, i + 1]
        )
        loss = loss - (advantage * log_prob).mean() / 2  # at ratio 1 the surrogate's slope is REINFORCE's
    slopes = torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(unet.parameters()))])
    result = bench.iteration(unet, schedule, condition, shape, bench.Savings(), steps=4, train_steps=2, seed=5)
    latents, log_probs, gradient = result.results
    assert torch.equal(latents, trajectory.latents[:, -1]) and torch.equal(log_probs, trajectory.log_probs)
    assert torch.allclose(gradient, slopes, rtol=1e-3, atol=1e-4 * float(slopes.abs().max()))
    assert not all(torch.equal(a, b) for a, b in zip(before, unet.parameters()))  # the weights have moved


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device: reading a number, comparing, copying back."""

    def __init__(self):
        super().__init__()
        self.count = self.sent = 0  # waits, and copies to the device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).partition(".")[2].partition(".")[0]
        on_device = any(isinstance(x, torch.Tensor) and x.device.type == "meta" for x in args)
        self.sent += name == "_to_copy" and not on_device and str((kwargs or {}).get("device")) == "meta"
        back = name == "_to_copy" and str((kwargs or {}).get("device")) == "cpu"
        if on_device and (back or name in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "item")):
            self.count += 1
            if name == "_local_scalar_dense":
                return 0.0
            if name == "equal":
                return False
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("guidance,waits", [(1.0, 0), (3.0, 1)])
def test_the_sampling_loop_never_waits_for_the_device(guidance, waits):
    """On a device that holds no numbers; with guidance, the two prompts are compared once, before the first step."""
    with torch.device("meta"):
        unet = UNet(TINY)
        context = torch.empty(2, 5, 12)
        condition = Condition(context, torch.empty(2, 1, 8, 8), torch.empty(2, 4, 8, 8), context.clone())
    sent = []
    for steps in (2, 6):
        generator = torch.Generator().manual_seed(0)
        with Waits() as seen:
            trajectory = rollout(
                unet, Schedule(ScheduleConfig()), condition, shape=(4, 8, 8), steps=steps, guidance=guidance,
                generator=generator,
            )  # fmt: skip
        assert trajectory.latents.shape == (2, steps + 1, 4, 8, 8) and seen.count == waits
        sent.append(seen.sent)
    assert sent[0] == sent[1] > 3  # noise, times and coefficients are sent once, before the first step


def test_waiting_is_counted():
    with torch.device("meta"):
        x = torch.empty(2)
    with Waits() as seen:
        float(x.sum())
        torch.equal(x, x)
    assert seen.count == 2


@pytest.mark.skipif(common.triton is None, reason="triton is not installed: pip install '.[parity]' on Linux")
def test_every_kernel_is_timed_against_the_same_computation():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = list(bench_kernels.cases(device, (("tiny", TINY, 2, 8, torch.float32),)))
    assert {c.name.split()[0] for c in found} == {
        "group_norm_act", "geglu", "q_sample", "ddim_step_logprob", "preference_loss"
    }  # fmt: skip
    for case in found:
        eager, fused = case.eager(*case.inputs), case.fused(*case.inputs)
        assert torch.allclose(eager, fused, atol=1e-5)
        slopes = [torch.autograd.grad(y, case.inputs, torch.ones_like(y)) for y in (eager, fused)]
        assert all(torch.allclose(p, q, atol=1e-4) for p, q in zip(*slopes))
        assert case.forward_bytes > 0 < case.backward_bytes


def test_the_loop_table_divides_what_it_measured(monkeypatch):
    """Median times of all rounds but the first; each form against the wasteful one, and its own difference."""
    cfg = bench.BenchConfig(rounds=3, batch_size=8)
    seconds = {(False, False, False): 6.0, (True, True, True): 2.0}
    rounds = []

    def iteration(saved, policy):
        form = (saved.one_branch, saved.keep_activations, saved.no_waiting)
        rounds.append(form)
        slow = 100.0 if rounds.count(form) == 1 else 1.0  # the first round warms up
        whole = seconds.get(form, 3.0) * slow
        off = 0.25 if form == (True, False, False) else 0.0
        return bench.Outcome([torch.tensor([2.0, 1.0 + off])], whole / 4, 3 * whole / 4)

    monkeypatch.setattr(bench, "iteration", iteration)
    monkeypatch.setattr(bench, "loop_setting", lambda *a: {"policy": torch.nn.Linear(1, 1)})
    rows = [x.strip("| ").split(" | ") for x in bench.loop_table(cfg, torch.device("cpu")).splitlines()[4:]]
    found = {name: [float(c) for c in cells] for name, *cells in rows}
    assert found["wasteful"] == [6, pytest.approx(8 / 1.5, abs=0.05), pytest.approx(8 / 4.5, abs=0.05), 1, 0]
    assert found["all"] == [2, 16, pytest.approx(8 / 1.5, abs=0.05), 3, 0]
    assert found["one branch"][3:] == [2, 0.12]  # 0.25 of the largest entry, 2, with two digits


def test_the_lean_loop_does_the_same_work_as_an_epoch_of_the_small_preset():
    small = dataclasses.replace(train_rl.RLConfig(), **train_rl.PRESETS["small"])
    work = [getattr(bench_lean, name) for name in ("PROMPTS", "SAMPLES", "STEPS", "TRAINED", "UPDATES", "LR", "CLIP")]
    names = ("prompts", "samples", "sampling_steps", "train_steps", "updates_per_epoch", "lr", "clip_range")
    assert work == [getattr(small, name) for name in names]


def test_a_lean_step_is_drawn_and_scored_like_ours():
    """Its log-probability lacks the normalising constant, which no ratio sees."""
    output, x, x_prev = torch.randn(3, 2, 4, 3, 3)
    k_x, k_out, sigma = 0.9, -0.4, 0.3
    _, log_prob = bench_lean.step(output, x, (k_x, k_out, sigma), x_prev=x_prev)
    ones = torch.ones(2)
    _, ours = ddim_step_logprob(output, x, k_x * ones, k_out * ones, sigma * ones, x_prev=x_prev)
    assert torch.allclose(log_prob - math.log(sigma) - 0.5 * math.log(2 * math.pi), ours, atol=1e-5)
    drawn, none = bench_lean.step(output, x, (k_x, k_out, 0.0))
    assert torch.allclose(drawn, k_x * x + k_out * output, atol=1e-6) and none is None


def test_an_epochs_table_gives_median_range_and_ratio(monkeypatch):
    ours, lean = iter(([2.0, 2.0], [1.0, 3.0], [4.0, 4.0])), iter(([9.0, 3.0, 3.0], [9.0, 8.0, 8.0], [9.0, 4.0, 8.0]))
    monkeypatch.setattr(bench_lean, "script_epochs", lambda epochs, threads: next(ours))
    process = types.SimpleNamespace(run=lambda *a, **k: types.SimpleNamespace(stdout=json.dumps(next(lean))))
    monkeypatch.setattr(bench_lean, "subprocess", process)
    rows = [line.strip("| ").split(" | ") for line in bench_lean.epoch_table(3, 1).splitlines()[4:]]
    assert [row[1:] for row in rows] == [["2.00", "2.00 to 4.00"], ["6.00", "3.00 to 8.00"], ["1.50", "1.50 to 4.00"]]


def test_gradients_are_compared_on_one_scale():
    """An error in a tiny gradient counts by the largest gradient, one in log-probabilities by theirs."""
    a = bench.Outcome([torch.ones(2), torch.tensor([4.0]), torch.tensor([1e-9, 2.0])], 0, 0)
    b = bench.Outcome([torch.ones(2), torch.tensor([4.0]), torch.tensor([3e-9, 2.0])], 0, 0)
    c = bench.Outcome([torch.ones(2), torch.tensor([4.4]), torch.tensor([1e-9, 2.0])], 0, 0)
    assert b.difference(a) == pytest.approx(1e-9) and c.difference(a) == pytest.approx(0.1)


@pytest.mark.slow
def test_bench_prints_a_table_with_machine_and_command(capsys, tmp_path):
    out = tmp_path / "bench.md"
    argv = ["--batch-size", "2", "--sampling-steps", "2", "--train-steps", "1", "--rounds", "1", "--out", str(out)]
    bench.main(argv)
    text = capsys.readouterr().out
    assert text.strip() == out.read_text(encoding="utf-8").strip()
    assert f"torch {torch.__version__}" in text and "minipref bench --batch-size 2" in text
    assert len(re.findall(r"^\| [a-z ]+ \| \d", text, re.M)) == len(NAMES) + 2


def test_guidance_of_equal_prompts_is_one_call():
    unet, _, condition, shape = setting()
    seen = []
    condition = Condition(condition.context, condition.mask, condition.masked, condition.context.clone())
    unet.register_forward_pre_hook(lambda m, x: seen.append(len(x[0])))
    predict(unet, torch.randn(3, *shape), 500, condition, guidance=3.0)
    assert seen == [3]
