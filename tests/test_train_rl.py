"""The main job, small enough to run in seconds, and the commands around it, on the shipped weights."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import train_rl
from minipref import evaluate, sample
from minipref.data.prompts import scene_prompts
from minipref.data.scenes import HELD_OUT_WORLD, draw, scenes, world
from minipref.diffusion import ddim_step, predict
from minipref.pipeline import SHIPPED, Pipeline, Sampling, load_unet
from minipref.runtime import checkpoint
from minipref.runtime.config import run_main

TINY = {
    "--epochs": 2, "--prompts": 3, "--samples": 2, "--steps": 3, "--train-steps": 2, "--eval-every": 1,
    "--eval-prompts": 8, "--win-prompts": 8,
}  # fmt: skip


def train(out, monkeypatch, **changes):
    """Runs train_rl.py in this process; -> its summary."""
    flags = {**TINY, **{"--" + k.replace("_", "-"): v for k, v in changes.items()}}
    argv = ["train_rl.py", "--small", "--out", str(out)] + [str(x) for pair in flags.items() for x in pair if x != ""]
    monkeypatch.setattr(sys, "argv", argv)
    train_rl.main()
    return json.loads((out / "summary.json").read_text())


def weights(folder):
    return load_unet(folder / "last.pt")[0].state_dict()


def stops_with(call, message, capsys):
    """Exit code 2 and one line that holds `message`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main("minipref", call)
    text = capsys.readouterr().err
    lines = [x for x in text.splitlines() if not re.match(r"[\w ]+: +\d+%\|", x)]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0], text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One tiny run that several tests look at."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("runs") / "a"
    summary = train(folder, patch)
    patch.undo()
    return folder, summary


def test_a_run_leaves_the_folder_that_its_documentation_promises(run):
    folder, summary = run
    expected = (
        "reward_before reward_after gold_before gold_after win_rate win_rate_ci judge kl stopped judged "
        "seconds peak_memory_mb seed"
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
    from minipref import rewards
    from minipref.data import annotator

    true = annotator.gold

    def spoilt(*args):
        r = true(*args)
        return annotator.Rating(*(x * float("nan") for x in (r.structure, r.texture, r.overall)))

    monkeypatch.setattr(train_rl, "gold", spoilt)
    monkeypatch.setattr(annotator, "gold", spoilt)
    monkeypatch.setattr(rewards.annotator, "gold", spoilt)
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
    assert "WinRate" in capsys.readouterr().out


def test_trust_and_kl_change_the_update_and_can_be_switched_off(run, tmp_path, monkeypatch):
    folder, _ = run
    base = weights(folder)
    for i, changes in enumerate(({"no-trust": ""}, {"kl_weight": 5.0}, {"clip_range": 0.01})):
        changed = weights_of(tmp_path / str(i), monkeypatch, changes)
        assert any(not torch.equal(base[k], changed[k]) for k in base), changes


def weights_of(out, monkeypatch, changes):
    train(out, monkeypatch, **changes)
    return weights(out)


def test_a_wrong_replay_stops_the_run_before_any_update(tmp_path, monkeypatch):
    true = train_rl.gaussian_log_prob
    monkeypatch.setattr(train_rl, "gaussian_log_prob", lambda *a: true(*a) + 1e-4)  # 0.3 nats over 3,072 dimensions
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


# ------------------------------------------------------------------------------------------------ sample, evaluate


def test_sample_shows_base_beside_aligned_and_keeps_known_pixels(run, tmp_path):
    folder, _ = run
    rng, out = np.random.default_rng(0), tmp_path / "s.png"
    picture, mask = rng.integers(0, 255, (32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(picture).save(tmp_path / "p.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    own = ["--image", str(tmp_path / "p.png"), "--mask", str(tmp_path / "m.png"), "--prompt", "a red circle"]
    sample.main(["--run", str(folder), "--count", "2", "--out", str(out), *own])
    made = {p.name: np.asarray(Image.open(p)) for p in (tmp_path / "s").iterdir()}
    assert sorted(made) == ["aligned_00.png", "aligned_01.png", "base_00.png", "base_01.png"]
    for name, x in made.items():
        assert np.array_equal(x[:, :20], picture[:, :20]), name
    assert (made["base_00.png"] != made["aligned_00.png"]).any() and (made["base_00.png"] != made["base_01.png"]).any()
    assert Image.open(out).size[0] > 200
    for given in ("p.png", "m.png"):
        before = (tmp_path / given).read_bytes()
        with pytest.raises(ValueError, match=f"{given}: is the picture to be read"):
            sample.main(["--run", str(folder), "--out", str(tmp_path / given), *own])
        assert (tmp_path / given).read_bytes() == before


def test_sample_needs_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--full", "--prompt", "a red circle on a blue background", "--count", "2", "--steps", "2"]
    sample.main(flags)
    assert (tmp_path / "sample.png").exists() and len(list((tmp_path / "sample").iterdir())) == 2
    mine = tmp_path / "mine"
    mine.mkdir()
    changed = torch.load(SHIPPED / "unet.pt", weights_only=True)
    changed["state"]["conv_out.bias"] += 1
    torch.save(changed, mine / "unet.pt")
    (mine / "clip.pt").write_bytes((SHIPPED / "clip.pt").read_bytes())
    sample.main([*flags, "--weights", str(mine), "--out", "mine.png"])
    assert (tmp_path / "mine.png").read_bytes() != (tmp_path / "sample.png").read_bytes()


def test_evaluate_reports_both_models_and_the_base_against_itself(run, capsys):
    folder, _ = run
    evaluate.main(["--run", str(folder), "--prompts", "16", "--best-of", "3", "--steps", "2"])
    text = (folder / "evaluation.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out and (folder / "evaluation.png").exists()
    assert (
        text.count("| base against itself |") == text.count("| aligned against base |") == 4
    )  # two judges, S = 1 and 3
    assert "nats" in text


def test_evaluate_without_a_run_judges_text_to_image(capsys, tmp_path):
    """The shipped weights, and those of a folder; with every true picture in place of the model's, all is obeyed."""
    evaluate.main(["--prompts", "8", "--steps", "2"])
    text = capsys.readouterr().out
    assert text.count("| things | captions | background | shape | colour | second | all |") == 2
    assert "guidance 5, seed 0" in text
    for name in ("unet.pt", "clip.pt"):
        (tmp_path / name).write_bytes((SHIPPED / name).read_bytes())
    evaluate.main(["--prompts", "8", "--steps", "2", "--weights", str(tmp_path)])
    assert capsys.readouterr().out == text
    with pytest.MonkeyPatch.context() as patch:
        batch = scenes(world(HELD_OUT_WORLD, 0), 0, 16)
        patch.setattr(Pipeline, "complete", lambda *a, **k: draw(batch))
        evaluate.main(["--prompts", "16"])
        assert capsys.readouterr().out.count("| any | 16 | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 |") == 2
        patch.setattr(Pipeline, "complete", lambda *a, **k: torch.zeros(16, 3, 32, 32))
        evaluate.main(["--prompts", "16"])
        assert re.search(r"\| any \| 16 \| 0\.\d+ \| 0\.000 \| 0\.000 \|", capsys.readouterr().out)
    with pytest.raises(ValueError, match="--weights: belongs to text-to-image"):
        evaluate.main(["--run", "x", "--weights", str(tmp_path)])


def test_the_base_against_itself_wins_s_of_s_plus_one(tmp_path, run):
    """A run whose last.pt is the base model. 96 prompts; bounds of 5.5 standard errors, false alarm 1e-7 in all."""
    folder, twin = run[0], tmp_path / "twin"
    twin.mkdir()
    (twin / "config.json").write_text((folder / "config.json").read_text())
    pipe = Pipeline.load(None)
    meta = torch.load(folder / "last.pt", weights_only=True)["meta"]
    checkpoint.save(twin / "last.pt", "unet", pipe.unet.config, pipe.unet.state_dict(), meta=meta)
    evaluate.main(["--run", str(twin), "--prompts", "96", "--steps", "2"])
    text = (twin / "evaluation.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| (base against itself|aligned against base) \| (\d+) \| ([\d.]+) \|", text)
    assert len(rows) == 2 * 2 * 3
    for _, s, rate in rows:
        expected = int(s) / (int(s) + 1)
        assert abs(float(rate) - expected) < 5.5 * math.sqrt(expected * (1 - expected) / 96), (s, rate)
    assert "rollout: 0.00 nats" in text


def test_the_table_counts_each_models_wins_over_the_same_opponent():
    base, aligned = torch.tensor([[1.0, 9.0], [1.0, 1.0]]), torch.tensor([[3.0, 3.0], [2.0, 0.0]])
    lines = evaluate.table("gold", base, torch.tensor([2.0, 2.0]), aligned, [1, 2])[2:]
    rates = [float(line.split("|")[3]) for line in lines]
    assert rates == [0.0, 0.5, 0.75, 0.75]


def test_the_kl_of_a_rollout_is_the_mean_log_ratio_of_its_paths():
    """Closed form against Monte Carlo: E[log p − log q] over 96 paths; 6 standard errors, false alarm 2e-9."""
    import copy

    pipe, prompts = Pipeline.load(None), scene_prompts(4, 0, 96)
    moved = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        moved.conv_out.bias += 0.02
    how = Sampling(3)
    exact = evaluate.path_kl(pipe, moved, prompts, how, seed=0)
    path, condition = pipe.sample(moved, prompts, how, 0, 3, range(96)), pipe.condition(prompts)
    n, total = path.latents[0, 0].numel(), torch.zeros(96)
    for i in range(2):
        t, t_prev = path.times(i)
        x, following = path.latents[:, i], path.latents[:, i + 1]
        with torch.no_grad():
            p, q = (ddim_step(pipe.schedule, predict(u, x, t, condition), x, t, t_prev, eta=1.0, x_prev=following)[1]
                    for u in (moved, pipe.unet))  # fmt: skip
        total += n * (p - q)
    assert exact.mean() > 1 and (total - exact).mean().abs() < 6 * (total - exact).std() / 96**0.5


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


def test_a_run_is_only_compared_with_the_base_model_that_it_came_from(run, tmp_path, capsys):
    folder, other = run[0], tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((folder / "config.json").read_text())
    content = torch.load(folder / "last.pt", weights_only=True)
    content["meta"]["base"] = "another"
    torch.save(content, other / "last.pt")
    stops_with(lambda: sample.main(["--run", str(other)]), "aligned from another base model", capsys)


@pytest.mark.parametrize("command", [sample.main, evaluate.main])
def test_a_damaged_run_is_one_line(command, run, tmp_path, capsys):
    folder, _ = run
    stops_with(lambda: command(["--run", str(tmp_path / "none")]), "no run lies there", capsys)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    stops_with(lambda: command(["--run", str(broken)]), "last.pt: no such checkpoint", capsys)
    half = (folder / "last.pt").read_bytes()
    (broken / "last.pt").write_bytes(half[: len(half) // 2])
    stops_with(lambda: command(["--run", str(broken)]), "last.pt: cannot be read as a checkpoint", capsys)
    assert sorted(p.name for p in broken.iterdir()) == ["config.json", "last.pt"]


def test_image_and_mask_of_different_sizes_are_one_line(run, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "p.png")
    Image.new("L", (16, 32), 255).save(tmp_path / "m.png")
    own = ["--image", str(tmp_path / "p.png"), "--mask", str(tmp_path / "m.png")]
    stops_with(lambda: sample.main(["--run", str(run[0]), *own]), "16×32 pixels but the picture 32×32", capsys)
    stops_with(lambda: sample.main(["--mask", "m.png"]), "--mask needs the --image", capsys)


# ------------------------------------------------------------------------------------------------ the shipped weights


def test_the_shipped_weights_fit_their_limit_and_fill_holes_plausibly():
    """A filled hole is nearer to the true scene than grey is, on 32 held-out prompts; the reward model ranks clean
    fills above sloppy ones of the same prompt."""
    from minipref.data.scenes import HELD_OUT_WORLD, sloppy, world
    from minipref.pipeline import learned_reward

    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) < 6e6
    pipe, prompts = Pipeline.load(None), scene_prompts(world(HELD_OUT_WORLD, 5), 0, 32)
    made = pipe.complete(pipe.unet, prompts, Sampling(6), seed=0, epoch=0)
    hole = prompts.masks

    def error(x):
        return ((x - prompts.images).abs() * hole).sum() / hole.sum()

    assert error(made) < 0.6 * error(prompts.masked)
    model = learned_reward(None)
    clean, spoilt = (model(x, prompts).value for x in (prompts.images, prompts.paste_known(sloppy(prompts.images))))
    assert (clean > spoilt).float().mean() > 0.9


def test_completions_do_not_depend_on_how_the_batch_is_split():
    pipe, prompts = Pipeline.load(None), scene_prompts(8, 0, 6)
    whole = pipe.complete(pipe.unet, prompts, Sampling(3), seed=1, epoch=2)
    parts = pipe.complete(pipe.unet, prompts, Sampling(3), seed=1, epoch=2, batch=4)
    assert torch.allclose(whole, parts, atol=1e-4)
    late = pipe.complete(pipe.unet, prompts.select([4, 5]), Sampling(3), seed=1, epoch=2, first=4)
    assert torch.allclose(whole[4:], late, atol=1e-4)
