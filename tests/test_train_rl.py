"""The main job, small enough to run in seconds, and the commands around it, on the shipped weights."""

import json
import re
import sys
import types

import numpy as np
import pytest
import torch
from helpers import stops_with
from helpers import train_tiny as train
from PIL import Image

import train_rl
from minipref import evaluate
from minipref.pipeline import SHIPPED, Pipeline, load_unet
from minipref.rewards import Scores


def weights(folder):
    return load_unet(folder / "last.pt")[0].state_dict()


def test_a_run_leaves_the_folder_that_its_documentation_promises(run):
    folder, summary = run
    expected = (
        "reward_before reward_after gold_before gold_after win_rate win_rate_ci judge win_rate_reward kl stopped "
        "judged seconds peak_memory_mb seed"
    )
    assert list(summary) == expected.split() and summary["judge"] == "gold"
    lo, hi = summary["win_rate_ci"]
    assert 0 <= lo <= summary["win_rate"] <= hi <= 1 and 1 <= summary["gold_before"] <= 7 and summary["kl"] > 0
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in rows] == [0, 1, 2]
    wanted = {
        "reward", "within_prompt_std", "log_ratio_min", "log_ratio_max", "clip_fraction", "kl", "gamma_q50", "norm_q50",
        "diversity", "eval_reward", "eval_gold", "grad_norm",
    }  # fmt: skip
    assert wanted <= set(rows[1]) and all(isinstance(rows[1][k], float) for k in wanted)
    assert rows[1]["log_ratio_min"] <= 0 <= rows[1]["log_ratio_max"] and rows[0]["eval_gold"] != rows[2]["eval_gold"]
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
    from minipref import named_rewards
    from minipref.data import annotator

    true = annotator.gold

    def spoilt(*args):
        r = true(*args)
        return annotator.Rating(*(x * float("nan") for x in (r.structure, r.texture, r.overall)))

    monkeypatch.setattr(train_rl, "gold", spoilt)
    monkeypatch.setattr(annotator, "gold", spoilt)
    monkeypatch.setattr(named_rewards.annotator, "gold", spoilt)
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


@pytest.mark.parametrize("kl_weight", [0, 0.5])
def test_micro_batching_gives_the_same_gradient(tmp_path, monkeypatch, kl_weight):
    whole = gradients(tmp_path / "a", monkeypatch, kl_weight=kl_weight, updates=1)
    parts = gradients(tmp_path / "b", monkeypatch, kl_weight=kl_weight, updates=1, micro_batch=5)  # 12 steps: 5, 5, 2
    assert len(whole) == len(parts) == 1 and whole[0].abs().max() > 0
    assert (whole[0] - parts[0]).abs().max() < 1e-4 * whole[0].abs().max()


def test_each_rollout_is_trained_in_as_many_updates_as_asked_for(tmp_path, monkeypatch):
    assert len(gradients(tmp_path / "a", monkeypatch, updates=3)) == 3
    assert len(gradients(tmp_path / "b", monkeypatch, updates=4)) == 4  # of six completions
    with pytest.raises(ValueError, match="--updates 7: more than the 6 completions"):
        train(tmp_path / "c", monkeypatch, updates=7)


def test_a_run_is_read_from_other_folders_than_it_was_started_in(tmp_path, monkeypatch, capsys):
    """The reward model that it names by a relative path is found again."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "mine").mkdir()
    (tmp_path / "here" / "mine" / "reward.pt").write_bytes((SHIPPED / "reward.pt").read_bytes())
    (tmp_path / "here" / "mymodel.py").write_text("def red(images, batch):\n    return images[:, 0].mean((1, 2))\n")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    train(tmp_path / "run", monkeypatch, epochs=1, reward="0.5*model:mine+0.5*mymodel:red")
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["reward"]
    assert kept == f"0.5*model:{tmp_path / 'here' / 'mine'}+0.5*mymodel:red"  # a module is no path
    monkeypatch.chdir(tmp_path)
    evaluate.main(["--run", str(tmp_path / "run"), "--prompts", "8", "--best-of", "1", "--steps", "2"])
    assert re.search(r"WinRate \d\.\d+ by it, \d\.\d+ by gold.*WinRate", capsys.readouterr().out, re.S)


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

    def half(images, batch):
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
    true = train_rl.score_step

    def wrong(*args, **kwargs):
        mean, sigma, log_prob = true(*args, **kwargs)
        return mean, sigma, log_prob + 1e-4  # 0.3 nats over 3,072 dimensions

    monkeypatch.setattr(train_rl, "score_step", wrong)
    with pytest.raises(ValueError, match="replay differs from the rollout by 0.31 nats before any update"):
        train(tmp_path / "a", monkeypatch)
    assert not (tmp_path / "a" / "last.pt").exists()


def darker(images, batch):
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

    def watched(images, batch):
        seen.append((images.clone(), batch))
        return true(images, batch)

    monkeypatch.setattr(sys.modules[__name__], "darker", watched)
    summary = train(tmp_path / "a", monkeypatch, data=pictures, reward=f"{__name__}:darker")
    assert "broken.jpg: not a readable picture" in capsys.readouterr().out
    assert summary["gold_after"] is None and summary["judge"] == "reward" and -1 < summary["reward_after"] < 0
    for images, batch in seen:
        known = (batch.masks < 0.5).expand_as(images)
        assert torch.equal(images[known], batch.images[known]) and batch.scenes is None
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


def constant(images, batch):
    return torch.ones(len(images))


def test_a_reward_that_says_nothing_is_refused_by_name_before_anything_is_written(tmp_path, monkeypatch, capsys):
    name = f"{__name__}:constant"
    call = lambda: train(tmp_path / "a", monkeypatch, reward=name)  # noqa: E731
    stops_with(call, f"reward {name}: gave all 8 pictures the value 1", capsys)
    assert not (tmp_path / "a").exists()


def test_a_short_run_raises_its_reward_and_the_kl_weight_holds_it_back(tmp_path, monkeypatch):
    """Brightness is easy to raise: the run must do so, by far more than any noise between two seeds' base models."""
    flags = {"reward": "brightness", "lr": 3e-4, "epochs": 10, "prompts": 6, "samples": 4, "ema": 0.5, "eval_every": 10}
    free = train(tmp_path / "free", monkeypatch, **flags)
    held = train(tmp_path / "held", monkeypatch, kl_weight=20, **flags)
    rows = [json.loads(x) for x in (tmp_path / "free" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval_reward"] > rows[0]["eval_reward"] + 0.02  # the same prompts and noise
    assert held["kl"] < 0.8 * free["kl"] and rows[-1]["kl"] > 1


def test_base_and_aligned_model_are_judged_under_independent_noise(tmp_path, monkeypatch):
    seen, true = [], Pipeline.complete

    def spy(self, unet, prompts, how, *, seed, epoch, **more):
        seen.append((len(prompts), epoch))
        return true(self, unet, prompts, how, seed=seed, epoch=epoch, **more)

    monkeypatch.setattr(Pipeline, "complete", spy)
    train(tmp_path / "a", monkeypatch, win_prompts=9)
    final = [epoch for count, epoch in seen if count == 9]
    curves = {epoch for count, epoch in seen if count == 8}
    assert len(final) == 2 and len({*final, *curves}) == 3 and len(curves) == 1  # curves share theirs
