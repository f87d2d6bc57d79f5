"""The main job, small enough to run in seconds, and the commands around it, on the shipped weights."""

import json
import platform
import sys
import types
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from helpers import stops_with
from helpers import train_tiny as train
from PIL import Image

import train_rl
from minipref import __version__
from minipref.pipeline import SHIPPED, Pipeline, load_unet
from minipref.reward_model import Scores
from minipref.runtime.config import parse
from minipref.toy import raters


def weights(folder):
    return load_unet(folder / "last.pt")[0].state_dict()


def rows(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def command_line(*flags):
    return parse(train_rl.RLConfig, list(flags), prog="x", description="", presets=train_rl.PRESETS)


def test_the_defaults_are_prefpaints_and_small_is_the_table_of_deviations():
    """PAPERS.md A5 and D: 16 completions of 16 prompts at 50 steps, 5 of them trained, gradients not clipped, no KL."""
    defaults = asdict(train_rl.RLConfig())
    paper = {
        "prompts": 16, "samples": 1, "sampling_steps": 50, "eta": 1, "train_steps": 5, "updates_per_epoch": 1,
        "lr": 2e-6, "weight_decay": 0.01, "grad_clip": 0, "trust": "exponential", "kl_weight": 0, "guard": 0, "ema": 0,
        "clip_range": round(1e-4 * 4 * 64 * 64, 2),  # 1e-4 of the mean over a latent of 512 pixels
    }  # fmt: skip
    assert {k: defaults[k] for k in paper} == paper and defaults["epochs"] == 1000
    small = {
        "epochs": 40, "samples": 4, "sampling_steps": 6, "updates_per_epoch": 2, "lr": 1e-4, "grad_clip": 1,
        "kl_weight": 0.03, "guard": 0.5, "ema": 0.9, "micro_batch": 64,
    }  # fmt: skip
    assert train_rl.PRESETS == {"small": small} and all(defaults[k] != v for k, v in small.items())
    for flags in (["--small"], ["--preset", "small"]):
        assert asdict(command_line(*flags)) == defaults | small | {"preset": "small"}
    assert asdict(command_line("--small", "--lr", "3e-4")) == defaults | small | {"preset": "small", "lr": 3e-4}


def test_a_run_leaves_the_folder_that_its_documentation_promises(run):
    folder, summary = run
    expected = (
        "reward_before reward_after gold_before gold_after win_rate win_rate_ci judge win_rate_reward kl stopped "
        "judged seconds peak_memory_mb seed"
    )
    assert list(summary) == expected.split() and summary["judge"] == "gold"
    lo, hi = summary["win_rate_ci"]
    assert 0 <= lo <= summary["win_rate"] <= hi <= 1 and 1 <= summary["gold_before"] <= 7 and summary["kl"] > 0
    config = json.loads((folder / "config.json").read_text())
    versions = {"minipref": __version__, "torch": torch.__version__, "python": platform.python_version()}
    assert (config.pop("script"), config.pop("versions")) == ("train_rl.py", versions)
    assert set(config) == {f.name for f in fields(train_rl.RLConfig)} and config["preset"] == "small"
    assert (config["sampling_steps"], config["lr"], config["device"]) == (3, 1e-4, "cpu")
    log = rows(folder)
    assert [r["epoch"] for r in log] == [0, 1, 2]
    wanted = {
        "reward", "within_prompt_std", "log_ratio_min", "log_ratio_max", "clip_fraction", "kl", "gamma_q50", "norm_q50",
        "diversity", "eval_reward", "eval_gold", "grad_norm",
    }  # fmt: skip
    assert wanted <= set(log[1]) and all(isinstance(log[1][k], float) for k in wanted)
    assert log[1]["log_ratio_min"] <= 0 <= log[1]["log_ratio_max"] and log[0]["eval_gold"] != log[2]["eval_gold"]
    for name in (
        "config.json",
        "command.txt",
        "curves.png",
        "last.pt",
        "best.pt",
        "samples/000000.png",
        "samples/000002.png",
    ):
        assert (folder / name).stat().st_size > 0
    assert Image.open(folder / "curves.png").size[0] > 600


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_seed_another(run, tmp_path, monkeypatch):
    folder, summary = run
    again = train(tmp_path / "b", monkeypatch)
    for key in set(summary) - {"seconds", "peak_memory_mb"}:
        assert again[key] == summary[key], key
    a, b = weights(folder), weights(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert train(tmp_path / "c", monkeypatch, seed=1)["reward_after"] != summary["reward_after"]


def test_gold_is_looked_at_but_never_trained_on(run, tmp_path, monkeypatch):
    """With NaN in its place, the weights are the same bit for bit."""
    folder, _ = run
    true = raters.gold

    def spoilt(*args):
        r = true(*args)
        return raters.Rating(*(x * float("nan") for x in (r.structure, r.texture, r.overall)))

    monkeypatch.setattr(raters, "gold", spoilt)
    summary = train(tmp_path / "b", monkeypatch)
    assert summary["gold_after"] is None  # the patch took hold
    for name in ("last.pt", "best.pt"):
        a, b = (load_unet(f / name)[0].state_dict() for f in (folder, tmp_path / "b"))
        assert all(torch.equal(a[k], b[k]) for k in a)


def gradients(out, monkeypatch, **changes):
    """Each update's gradient, before it is clipped."""
    seen = []

    def spy(parameters, limit):
        parameters = list(parameters)
        seen.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        return torch.tensor(0.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    train(out, monkeypatch, epochs=1, **changes)
    return seen


@pytest.mark.parametrize("kl_weight", [pytest.param(0, marks=pytest.mark.slow), 0.5])
def test_micro_batching_gives_the_same_gradient(tmp_path, monkeypatch, kl_weight):
    whole = gradients(tmp_path / "a", monkeypatch, kl_weight=kl_weight, updates_per_epoch=1)
    changes = {"kl_weight": kl_weight, "updates_per_epoch": 1, "micro_batch": 5}  # 12 steps: 5, 5, 2
    parts = gradients(tmp_path / "b", monkeypatch, **changes)
    assert len(whole) == len(parts) == 1 and whole[0].abs().max() > 0
    assert (whole[0] - parts[0]).abs().max() < 1e-4 * whole[0].abs().max()


def test_each_rollout_is_trained_in_as_many_updates_as_asked_for(tmp_path, monkeypatch):
    assert len(gradients(tmp_path / "a", monkeypatch, updates_per_epoch=3)) == 3
    assert len(gradients(tmp_path / "b", monkeypatch, updates_per_epoch=4)) == 4  # of six completions
    with pytest.raises(ValueError, match="--updates-per-epoch 7: more than the 6 completions"):
        train(tmp_path / "c", monkeypatch, updates_per_epoch=7)


@pytest.mark.parametrize("grad_clip", [0, 1e-3])
def test_the_gradient_is_clipped_where_a_limit_is_named_and_0_names_none(tmp_path, monkeypatch, grad_clip):
    """Of a reward that is trusted ten thousandfold, so that the gradient is larger than any limit one would name."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        parameters = list(parameters)
        before = [p.grad.clone() for p in parameters]
        norm = clip(parameters, limit)
        seen.append((before, [p.grad.clone() for p in parameters]))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    steep = types.SimpleNamespace(f=lambda x, _: Scores(x.mean((1, 2, 3)), torch.full((len(x),), 1e4)))
    monkeypatch.setitem(sys.modules, "steep", steep)
    train(tmp_path / "x", monkeypatch, epochs=1, grad_clip=grad_clip, reward="steep:f")
    norms = [[torch.cat([g.flatten() for g in part]).double().norm().item() for part in pair] for pair in seen]
    assert len(norms) == 2 and all(before > 20 for before, _ in norms)
    assert all(after == pytest.approx(grad_clip or before, rel=1e-4) for before, after in norms)
    assert rows(tmp_path / "x")[1]["grad_norm"] == pytest.approx(sum(before for before, _ in norms) / 2, rel=1e-4)
    if not grad_clip:
        assert all(torch.equal(a, b) for pair in seen for a, b in zip(*pair))


def kl_by_hand(base, policy, schedule, trajectory, condition, sample, step):
    """KL(policy ‖ base) in nats of one step of one sample: the two means from x0 and eps (PrefPaint Eq. 2), eta 1."""
    abar, times = [*schedule.abar.tolist(), 1.0], [*trajectory.timesteps.tolist(), -1]
    a, p = abar[times[step]], abar[times[step + 1]]
    variance, means = (1 - p) / (1 - a) * (1 - a / p), []
    x, one = trajectory.latents[[sample], step], condition[[sample]]
    with torch.no_grad():
        for unet in (policy, base):
            v = unet(one.unet_input(x), torch.tensor([times[step]]), one.context).double()
            x_0, eps = a**0.5 * x - (1 - a) ** 0.5 * v, a**0.5 * v + (1 - a) ** 0.5 * x
            means.append(p**0.5 * x_0 + (1 - p - variance) ** 0.5 * eps)
    return ((means[0] - means[1]) ** 2).sum().item() / (2 * variance)


@pytest.mark.slow
def test_with_a_kl_weight_the_logged_kl_is_that_of_the_trained_steps(tmp_path, monkeypatch):
    """Two of three random steps of each sample stand for all three; every pair counts alike, however they are split.

    Six completions in two updates: before the first one the policy is the base, and its KL is 0.
    """
    base, seen, true = Pipeline.load(None).unet, {}, train_rl.replay

    def spy(unet, schedule, trajectory, condition, samples, steps, **more):
        if torch.is_grad_enabled():  # the policy, in an update
            pairs = seen.setdefault(id(trajectory), (trajectory, []))[1]
            for sample, step in zip(samples.tolist(), steps.tolist()):
                kl = kl_by_hand(base, unet, schedule, trajectory, condition, sample, step)
                pairs.append((sample, step, kl))
        return true(unet, schedule, trajectory, condition, samples, steps, **more)

    monkeypatch.setattr(train_rl, "replay", spy)
    changes = {"sampling_steps": 4, "micro_batch": 4, "lr": 1e-3, "eval_every": 2}
    train(tmp_path / "x", monkeypatch, kl_weight=0.03, **changes)
    log = rows(tmp_path / "x")
    assert "kl" not in log[0] and len(seen) == 2
    for row, (_, pairs) in zip(log[1:], seen.values(), strict=True):
        samples = [[(i, kl) for sample, i, kl in pairs if sample == k] for k in range(6)]
        assert all(len({i for i, _ in own}) == len(own) == 2 for own in samples)
        expected = sum(3 / 2 * sum(kl for _, kl in own) for own in samples) / 6
        assert row["kl"] == pytest.approx(expected, rel=2e-3)
    first = [kl for _, _, kl in seen[next(iter(seen))][1]]
    assert len(first) == 12 and max(first[:6]) < 1e-9 and min(first[6:]) > 1e-3
    train(tmp_path / "y", monkeypatch, kl_weight=0.03, epochs=1, updates_per_epoch=1)
    assert rows(tmp_path / "y")[1]["kl"] == 0


def test_without_a_kl_weight_kl_is_measured_at_evaluations_over_all_steps_of_one_sample_a_prompt(tmp_path, monkeypatch):
    """Of the policy after the epoch's updates; without averaging it is the one that is kept."""
    seen, true = {}, Pipeline.rollout

    def spy(self, unet, prompts, sampling, seed, stream, indices, condition=None):
        found = true(self, unet, prompts, sampling, seed, stream, indices, condition)
        seen[stream] = found, condition
        return found

    monkeypatch.setattr(Pipeline, "rollout", spy)
    changes = {"sampling_steps": 4, "epochs": 3, "eval_every": 2, "lr": 1e-3, "guard": 0}
    train(tmp_path / "x", monkeypatch, kl_weight=0, ema=0, **changes)
    log = rows(tmp_path / "x")
    assert [("kl" in r, "eval_reward" in r) for r in log] == [(False, True), (False, False), (True, True), (True, True)]
    base, policy, (trajectory, condition) = Pipeline.load(None), load_unet(tmp_path / "x" / "last.pt")[0], seen[3]
    taken = base.unet, policy, base.schedule, trajectory, condition
    every = [kl_by_hand(*taken, sample, step) for sample in (0, 2, 4) for step in (0, 1, 2)]
    assert log[3]["kl"] == pytest.approx(sum(every) / 3, rel=2e-3) and log[2]["kl"] > 0


@pytest.mark.slow
def test_trust_and_kl_change_the_update_and_can_be_switched_off(run, tmp_path, monkeypatch):
    folder, _ = run
    base = weights(folder)
    for i, changes in enumerate(({"trust": "off"}, {"trust": "constant"}, {"kl_weight": 5.0}, {"clip_range": 0.01})):
        changed = weights_of(tmp_path / str(i), monkeypatch, changes)
        assert any(not torch.equal(base[k], changed[k]) for k in base), changes


@pytest.mark.parametrize(
    "trust,expected", [("exponential", [0.5, 2.0]), ("constant", [1.25, 1.25]), ("off", [1.0, 1.0])]
)
def test_the_surrogate_is_weighted_by_the_trust_that_was_asked_for(tmp_path, monkeypatch, trust, expected):
    """Of a reward whose gamma is 0.5 for each prompt's first picture and 2 for its second: the mean is 1.25."""
    seen, true = [], train_rl.clipped_surrogate

    def spy(*args, **kwargs):
        seen.append(kwargs["gamma"])
        return true(*args, **kwargs)

    def half(images, prompts):
        return Scores(images.mean((1, 2, 3)), torch.tensor([0.5, 2.0]).repeat(len(images) // 2), {})

    monkeypatch.setattr(train_rl, "clipped_surrogate", spy)
    monkeypatch.setitem(sys.modules, "half_trusted", types.SimpleNamespace(half=half))
    train(tmp_path / "x", monkeypatch, trust=trust, reward="half_trusted:half", epochs=1)
    used = torch.cat([w.flatten() for w in seen]).tolist()
    assert sorted(set(used)) == sorted(set(expected)) and used.count(expected[0]) == len(used) // len(set(expected))


def weights_of(out, monkeypatch, changes):
    train(out, monkeypatch, **changes)
    return weights(out)


def test_a_wrong_replay_stops_the_run_before_any_update(tmp_path, monkeypatch):
    true = train_rl.replay

    def wrong(*args, **kwargs):
        log_prob, mean, sigma = true(*args, **kwargs)
        return log_prob + 1e-4, mean, sigma  # 0.3 nats over 3,072 dimensions

    monkeypatch.setattr(train_rl, "replay", wrong)
    with pytest.raises(ValueError, match="replay differs from the rollout by 0.31 nats before any update"):
        train(tmp_path / "a", monkeypatch)
    assert [r["epoch"] for r in rows(tmp_path / "a")] == [0]
    for name in ("last.pt", "best.pt"):  # the base itself
        unet, _, meta = load_unet(tmp_path / "a" / name)
        base = load_unet(SHIPPED / "unet.pt")[0].state_dict()
        assert meta["epoch"] == 0 and all(torch.equal(v, base[k]) for k, v in unet.state_dict().items())


def darker(images, prompts):
    return -images.mean((1, 2, 3))


def test_your_own_reward_and_your_own_pictures(tmp_path, monkeypatch, capsys):
    """Known pixels stay as they were, and the reward is the one that was named."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (50 + i, 40, 3), np.uint8)).save(pictures / f"{i}.png")
    (pictures / "broken.jpg").write_text("no picture")
    seen, true = [], darker

    def watched(images, prompts):
        seen.append((images.clone(), prompts))
        return true(images, prompts)

    monkeypatch.setattr(sys.modules[__name__], "darker", watched)
    summary = train(tmp_path / "a", monkeypatch, data=pictures, reward=f"{__name__}:darker")
    assert "broken.jpg: not a readable picture" in capsys.readouterr().out
    assert summary["gold_after"] is None and summary["judge"] == "reward" and -1 < summary["reward_after"] < 0
    for images, prompts in seen:
        known = (prompts.masks < 0.5).expand_as(images)
        assert torch.equal(images[known], prompts.images[known]) and prompts.truth is None
    assert len(seen) > 4


@pytest.mark.parametrize(
    "flag,value,message",
    [
        ("eta", 0, "deterministic and have no probability"),
        ("weights", "nowhere", "nowhere: no such folder of weights"),
        ("data", "nowhere", "nowhere: no such folder of pictures"),
        ("reward", "nonsense", "--reward nonsense: unknown; choose model"),
        ("device", "toaster", "--device toaster: not available here"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(flag, value, message, tmp_path, monkeypatch, capsys):
    stops_with(lambda: train(tmp_path / "a", monkeypatch, **{flag: value}), message, capsys)
    assert not (tmp_path / "a").exists()


def constant(images, prompts):
    return torch.ones(len(images))


def test_a_reward_that_says_nothing_is_refused_by_name_before_anything_is_written(tmp_path, monkeypatch, capsys):
    name = f"{__name__}:constant"
    call = lambda: train(tmp_path / "a", monkeypatch, reward=name)  # noqa: E731
    stops_with(call, f"reward {name}: gave all 64 pictures the value 1", capsys)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_short_run_raises_its_reward_and_the_kl_weight_holds_it_back(tmp_path, monkeypatch):
    """Brightness is easy to raise: the run must do so, by far more than any noise between two seeds' base models."""
    flags = {"reward": "brightness", "lr": 3e-4, "epochs": 10, "prompts": 6, "samples": 4, "ema": 0.5, "eval_every": 10}
    free = train(tmp_path / "free", monkeypatch, **flags)
    held = train(tmp_path / "held", monkeypatch, kl_weight=20, **flags)
    log = rows(tmp_path / "free")
    assert log[-1]["eval_reward"] > log[0]["eval_reward"] + 0.02  # the same prompts and noise
    assert held["kl"] < 0.8 * free["kl"] and log[-1]["kl"] > 1
