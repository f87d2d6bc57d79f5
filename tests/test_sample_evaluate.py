"""The commands around a run: `sample` and `evaluate`, on the shipped weights; and those weights themselves."""

import json
import math
import re
import shutil
from copy import deepcopy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from helpers import stops_with
from helpers import train_tiny as train
from PIL import Image

from minipref.commands import evaluate, sample
from minipref.data.pictures import read_image
from minipref.data.prompts import text_prompts
from minipref.diffusion import STREAMS, ddim_step, predict, replay
from minipref.pipeline import SHIPPED, Pipeline, Sampling, load_unet
from minipref.reward_model import LearnedReward
from minipref.runtime import checkpoint
from minipref.toy.raters import gold
from minipref.toy.world import COLOURS, describe, draw, scene_prompts, scenes, sloppy

HELD_OUT = 5 * 1_000_003  # the seed of the held-out prompts


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
        with pytest.raises(ValueError, match=f"--out .*{given}: is there already"):
            sample.main(["--run", str(folder), "--out", str(tmp_path / given), *own])
        assert (tmp_path / given).read_bytes() == before


def test_sample_needs_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--full", "--prompt", "a red circle on a blue background", "--count", "2", "--sampling-steps", "2"]
    sample.main(flags)
    assert (tmp_path / "sample.png").exists() and len(list((tmp_path / "sample").iterdir())) == 2
    mine = tmp_path / "mine"
    mine.mkdir()
    changed = torch.load(SHIPPED / "unet.pt", weights_only=True)
    changed["state"]["conv_out.bias"] += 1
    torch.save(changed, mine / "unet.pt")
    (mine / "clip.pt").write_bytes((SHIPPED / "clip.pt").read_bytes())
    sample.main([*flags, "--weights", str(mine), "--out", "own.png"])
    assert (tmp_path / "own.png").read_bytes() != (tmp_path / "sample.png").read_bytes()


def test_evaluate_reports_both_models_and_the_base_against_itself(run, capsys):
    folder, _ = run
    evaluate.main(["--run", str(folder), "--prompts", "16", "--best-of", "3", "--sampling-steps", "2"])
    text = (folder / "evaluation.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out and (folder / "evaluation.png").exists()
    assert (
        text.count("| base against itself |") == text.count("| aligned against base |") == 4
    )  # two judges, S = 1 and 3
    assert "nats" in text


def test_evaluate_without_a_run_judges_text_to_image(capsys, tmp_path):
    """The shipped weights, and those of a folder; with every true picture in place of the model's, all is obeyed."""
    evaluate.main(["--prompts", "8", "--sampling-steps", "2"])
    text = capsys.readouterr().out
    assert text.count("| things | captions | background | shape | colour | second | all |") == 2
    assert "guidance 5, seed 0" in text
    for name in ("unet.pt", "clip.pt"):
        (tmp_path / name).write_bytes((SHIPPED / name).read_bytes())
    evaluate.main(["--prompts", "8", "--sampling-steps", "2", "--weights", str(tmp_path)])
    assert capsys.readouterr().out == text
    with pytest.MonkeyPatch.context() as patch:
        batch = scenes(HELD_OUT, 0, 16)
        patch.setattr(Pipeline, "complete", lambda *a, **k: draw(batch))
        evaluate.main(["--prompts", "16"])
        assert capsys.readouterr().out.count("| any | 16 | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 |") == 2
        # Another background is no fault where the caption names none: in the first table half of the time.
        rng = np.random.default_rng(HELD_OUT)
        silent = [describe(s, rng)[1].background == "" for s in batch]
        free = [set(COLOURS) - {s.background, *(c for x in s.things for c in (x.colour, x.second))} for s in batch]
        changed = [replace(s, background=min(f)) if quiet else s for s, f, quiet in zip(batch, free, silent)]
        patch.setattr(Pipeline, "complete", lambda *a, **k: draw(changed))
        evaluate.main(["--prompts", "16"])
        shares = [float(x) for x in re.findall(r"\| any \| 16 \| ([\d.]+) ", capsys.readouterr().out)]
        assert shares == [1, pytest.approx(1 - sum(silent) / 16, abs=1e-3)] and 0 < sum(silent) < 16
        patch.setattr(Pipeline, "complete", lambda *a, **k: torch.zeros(16, 3, 32, 32))
        evaluate.main(["--prompts", "16"])
        assert re.search(r"\| any \| 16 \| 0\.\d+ \| 0\.000 \| 0\.000 \|", capsys.readouterr().out)
    with pytest.raises(ValueError, match="--data, --reward: belong to a run"):
        evaluate.main(["--reward", "brightness"])


@pytest.mark.slow
def test_the_base_against_itself_wins_s_of_s_plus_one(tmp_path, run):
    """A run whose last.pt is the base model. 96 prompts; bounds of 5.5 standard errors, false alarm 1e-7 in all."""
    folder, twin = run[0], tmp_path / "twin"
    twin.mkdir()
    (twin / "config.json").write_text((folder / "config.json").read_text())
    pipe = Pipeline.load(None)
    meta = torch.load(folder / "last.pt", weights_only=True)["meta"]
    checkpoint.save(twin / "last.pt", "unet", pipe.unet.config, pipe.unet.state_dict(), meta=meta)
    evaluate.main(["--run", str(twin), "--prompts", "96", "--sampling-steps", "2"])
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


@pytest.mark.slow
def test_the_kl_of_a_rollout_is_the_mean_log_ratio_of_its_trajectories():
    """Closed form against Monte Carlo: E[log p − log q] over 96 rollouts; 6 standard errors, false alarm 2e-9. And by
    the means of each step, on trajectories of the stream "kl"."""
    pipe, prompts = Pipeline.load(None), scene_prompts(4, 0, 96)
    moved = deepcopy(pipe.unet)
    with torch.no_grad():
        moved.conv_out.bias += 0.02
    sampling, condition = Sampling(3), pipe.condition(prompts)
    exact = pipe.kl_to_base(moved, prompts, sampling, seed=0)
    trajectory = pipe.rollout(moved, prompts, sampling, 0, 3, range(96))
    n, total = trajectory.latents[0, 0].numel(), torch.zeros(96)
    for i in range(2):
        t, t_prev = trajectory.timesteps[i], trajectory.timesteps[i + 1]
        x, following = trajectory.latents[:, i], trajectory.latents[:, i + 1]
        with torch.no_grad():
            p, q = (ddim_step(pipe.schedule, predict(u, x, t, condition), x, t, t_prev, eta=1.0, x_prev=following)[1]
                    for u in (moved, pipe.unet))  # fmt: skip
        total += n * (p - q)
    assert exact.mean() > 1 and (total - exact).mean().abs() < 6 * (total - exact).std() / 96**0.5
    trajectory, again = pipe.rollout(moved, prompts, sampling, 0, -4, range(96)), torch.zeros(96)
    for step in (0, 1):
        taken = pipe.schedule, trajectory, condition, torch.arange(96), torch.full((96,), step)
        with torch.no_grad():
            (_, p, sigma), (_, q, _) = (replay(u, *taken, eta=1.0) for u in (moved, pipe.unet))
        again += ((p - q).square() / (2 * sigma**2)).sum((1, 2, 3))
    assert torch.allclose(exact, again, rtol=1e-3)


def redrawn(folder, name, stream, start, held_out=0, eta=1.0, seed=0):
    """Rewards and gold of held-out prompts `start` to `start` + 7, as a run of three steps draws them."""
    pipe, prompts = Pipeline.load(None), scene_prompts(HELD_OUT + held_out, start, 8)
    unet = pipe.unet if name == "base" else load_unet(folder / "last.pt")[0]
    images = pipe.complete(unet, prompts, Sampling(3, eta), seed=seed, stream=stream)
    reward = LearnedReward.load(SHIPPED / "reward.pt")
    return {"reward": reward(images, prompts).value, "gold": gold(images, prompts.masks, prompts.truth).label}


def wins(after, before):
    return ((after > before).double() + (after == before).double() / 2).mean().item()


def test_base_and_aligned_model_are_judged_under_independent_noise_and_curves_share_theirs(run):
    """Everything that a run reports of held-out prompts, drawn again with the streams' numbers: prompts 0 to 7 are the
    curves', 8 to 15 those of the final comparison."""
    folder, summary = run
    log = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    reported = [{k: log[i][f"eval_{k}"] for k in ("reward", "gold")} for i in (0, 2)]
    reported += [{k: summary[f"{k}_{when}"] for k in ("reward", "gold")} for when in ("before", "after")]
    again = [redrawn(folder, *x) for x in (("base", -1, 0), ("aligned", -1, 0), ("base", -2, 8), ("aligned", -3, 8))]
    for found, values in zip(reported, again, strict=True):
        assert found == pytest.approx({k: v.mean().item() for k, v in values.items()}, abs=1e-4)
    before, after = again[2:]
    assert summary["win_rate"] == wins(after["gold"], before["gold"])
    assert summary["win_rate_reward"] == wins(after["reward"], before["reward"])
    shared = redrawn(folder, "aligned", -2, 8)["reward"].mean().item()
    assert abs(summary["reward_after"] - shared) > 1e-3  # the base's noise would have been noticed
    aligned, prompts = load_unet(folder / "last.pt")[0], scene_prompts(HELD_OUT, 8, 8)
    kl = Pipeline.load(None).kl_to_base(aligned, prompts, Sampling(3), seed=0).mean().item()
    assert summary["kl"] == pytest.approx(kl, rel=1e-3)
    assert [STREAMS[k] for k in ("curves", "judge base", "judge aligned", "kl")] == [-1, -2, -3, -4]


def test_evaluate_draws_every_sample_of_either_model_with_noise_of_its_own(run, tmp_path):
    """Streams 1000 (the opponent), 2000 and on (the base's samples), 3000 and on, drawn again; S = 1 and 3. Of a run
    of another seed, held-out world and eta, on prompts after those of its curves."""
    folder, changes = tmp_path / "x", {"seed": 5, "held_out": 3, "eta": 0.5, "eval_prompts": 11}
    shutil.copytree(run[0], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    changes.pop("eval_prompts")
    evaluate.main(["--run", str(folder), "--prompts", "8", "--best-of", "3"])
    text, opponent = (
        (folder / "evaluation.md").read_text(encoding="utf-8"),
        redrawn(folder, "base", 1000, 11, **changes),
    )
    for name, stream in (("base", 2000), ("aligned", 3000)):
        samples = [redrawn(folder, name, stream + i, 11, **changes) for i in range(3)]
        for judge in ("reward", "gold"):
            scores = torch.stack([s[judge] for s in samples], 1)  # (P, S)
            rates, moments = (text.partition(x)[2] for x in (f"| WinRate by {judge} |", f"| {judge} | mean |"))
            for s in (1, 3):
                rate, lo, hi, own = re.search(
                    rf"\| {name} against .* \| {s} \| (\S+) \| (\S+) to (\S+) \| (.*) \|", rates
                ).groups()
                share = wins(scores[:, :s].max(1).values, opponent[judge])
                assert float(rate) == pytest.approx(share, abs=6e-4)
                # Wilson 1927: where z standard errors of the true share p are |share - p|; 0 and 1 end the line.
                for p in (float(lo), float(hi)):
                    assert (share - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / 8, abs=2e-3)
                assert float(lo) <= share <= float(hi) and float(hi) - float(lo) > 0.3
                assert own.strip() == ({1: "0.500", 3: "0.750"}[s] if name == "base" else "")
            mean, variance = re.search(rf"\| {name} \| (\S+) \| (\S+) \|", moments).groups()
            assert float(mean) == pytest.approx(scores.mean().item(), abs=6e-4)
            assert float(variance) == pytest.approx(scores.var(1).mean().item(), abs=6e-4)
    aligned, prompts = load_unet(folder / "last.pt")[0], scene_prompts(HELD_OUT + 3, 11, 8)
    kl = Pipeline.load(None).kl_to_base(aligned, prompts, Sampling(3, 0.5), seed=5)
    nats, deviation = re.search(r"rollout: (\S+) nats, standard deviation (\S+)\.\n", text).groups()
    assert (float(nats), float(deviation)) == pytest.approx((kl.mean().item(), kl.std().item()), abs=6e-3)
    assert float(nats) > 0.05


# ------------------------------------------------------------------------------------------------ runs of before 0.2


NEWER = ("script", "versions", "preset", "reward_batch")  # keys that no run of then has
OLD_RL = """weights data reward out seed epochs prompts samples steps eta train_steps updates lr weight_decay grad_clip
 clip_range trust kl_weight guard ema micro_batch eval_every eval_prompts win_prompts held_out device threads"""
OLD_RPO = {
    "weights": "", "subject": 1, "references": "", "class_name": "", "live": False, "prompts": "", "out": "runs/rpo",
    "seed": 0, "train_prompts": 8, "images": 4, "lam_train": 0.5, "label_temperature": 1.0, "soft_labels": True,
    "reference_prompt": "modified", "share_noise": False, "mode": "rpo", "beta": 1.0, "steps": 40, "batch": 4,
    "lr": 0.0005, "weight_decay": 0.01, "grad_clip": 1.0, "lam_val": 0.5, "mean": "harmonic", "val_prompts": 2,
    "val_images": 2, "val_every": 20, "patience": 4, "sample_steps": 3, "guidance": 2.0, "eta": 0.5,
    "test_prompts": 4, "test_images": 1, "image_encoder": "", "device": "cpu", "threads": 1,
}  # fmt: skip


def written(path, new):
    """Every picture that `sample` writes for a run, by its name."""
    prompt = ["--prompt", "a [V] square on a red background"] if "rpo" in new.name else []
    out = path / f"of_{new.name}.png"
    sample.main(["--run", str(new), "--count", "2", "--out", str(out), *prompt])
    pictures = {p.name: p.read_bytes() for p in out.with_suffix("").iterdir()} | {"grid": out.read_bytes()}
    assert len(pictures) == 5
    return pictures


def test_a_run_of_train_rl_from_before_0_2_opens_as_it_did(run, tmp_path):
    """Its config.json knows neither script nor preset, and calls two things otherwise; pictures and report are those
    of the same run with today's names."""
    new, old = tmp_path / "rl", tmp_path / "rl_old"
    for folder in (new, old):
        shutil.copytree(run[0], folder)
    names = {"sampling_steps": "steps", "updates_per_epoch": "updates"}
    config = json.loads((new / "config.json").read_text())
    config = {names.get(k, k): v for k, v in config.items() if k not in NEWER}
    assert sorted(config) == sorted(OLD_RL.split()) and config["steps"] == 3
    (old / "config.json").write_text(json.dumps(config))
    assert written(tmp_path, old) == written(tmp_path, new)
    reports = []
    for folder in (new, old):
        evaluate.main(["--run", str(folder), "--prompts", "8", "--best-of", "1"])
        text = (folder / "evaluation.md").read_text(encoding="utf-8").replace(str(folder), "")
        reports.append((text, (folder / "evaluation.png").read_bytes()))
    assert reports[0] == reports[1] and "3 steps" in reports[0][0]


def test_a_run_of_train_rpo_from_before_0_2_opens_as_it_did(tmp_path, capsys):
    """As it stood on the disk: `steps` were its updates, `sample_steps` those of the pictures; best.pt counts."""
    pipe, pictures = Pipeline.load(None), {}
    meta = {"schedule": asdict(pipe.schedule.config), "base": pipe.fingerprint, "step": 40}
    names = {"steps": "updates", "sample_steps": "sampling_steps", "prompts": "prompt_file", "batch": "batch_size"}
    today = {names.get(k, k): v for k, v in OLD_RPO.items()} | {"preset": "small", "script": "train_rpo.py"}
    aligned = deepcopy(pipe.unet)
    with torch.no_grad():
        aligned.conv_out.bias += 0.1
    for name, config in (("rpo_old", OLD_RPO), ("rpo", today)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        for file, unet in (("last", pipe.unet), ("best", aligned)):
            checkpoint.save(folder / f"{file}.pt", "unet", unet.config, unet.state_dict(), meta=meta)
        pictures[name] = written(tmp_path, folder)
    assert pictures["rpo_old"] == pictures["rpo"]
    prompts = text_prompts(["a [V] square on a red background"] * 2)
    made = pipe.complete(aligned, prompts, Sampling(3, 0.5, 2.0), seed=0, stream=0)
    for i, x in enumerate(made):
        assert torch.allclose(read_image(tmp_path / "of_rpo" / f"aligned_{i:02d}.png", None), x.clamp(0, 1), atol=0.003)
    stops_with(lambda: evaluate.main(["--run", str(tmp_path / "rpo_old")]), "no run of train_rl.py, it lacks", capsys)


def test_a_run_is_read_from_other_folders_than_it_was_started_in(tmp_path, monkeypatch, capsys):
    """The reward model that it names by a relative path is found again."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "mine").mkdir()
    (tmp_path / "here" / "mine" / "reward.pt").write_bytes((SHIPPED / "reward.pt").read_bytes())
    (tmp_path / "here" / "mymodel.py").write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    train(tmp_path / "run", monkeypatch, epochs=1, reward="0.5*model:mine+0.5*mymodel:red")
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["reward"]
    assert kept == f"0.5*model:{tmp_path / 'here' / 'mine'}+0.5*mymodel:red"  # a module is no path
    monkeypatch.chdir(tmp_path)
    flags = "--prompts 8 --best-of 1 --sampling-steps 2 --reward 0.5*model:here/mine+0.5*mymodel:red"
    evaluate.main(["--run", str(tmp_path / "run"), *flags.split()])
    assert re.search(r"WinRate \d\.\d+ by it, \d\.\d+ by gold.*WinRate", capsys.readouterr().out, re.S)


def test_a_run_is_only_compared_with_the_base_model_that_it_came_from(run, tmp_path, capsys):
    folder, other = run[0], tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((folder / "config.json").read_text())
    content = torch.load(folder / "last.pt", weights_only=True)
    content["meta"]["base"] = "another"
    torch.save(content, other / "last.pt")
    stops_with(lambda: sample.main(["--run", str(other)]), "trained from another base model", capsys)


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


def test_the_shipped_weights_fit_their_limit_and_fill_holes_plausibly():
    """A filled hole is nearer to the true scene than grey is, on 32 held-out prompts; the reward model ranks clean
    fills above sloppy ones of the same prompt."""
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) < 6e6
    pipe, prompts = Pipeline.load(None), scene_prompts(HELD_OUT + 5, 0, 32)
    made = pipe.complete(pipe.unet, prompts, Sampling(6), seed=0, stream=0)
    hole = prompts.masks

    def error(x):
        return ((x - prompts.images).abs() * hole).sum() / hole.sum()

    assert error(made) < 0.6 * error(prompts.masked)
    model = LearnedReward.load(SHIPPED / "reward.pt")
    clean, spoilt = (model(x, prompts).value for x in (prompts.images, prompts.paste_known(sloppy(prompts.images))))
    assert (clean > spoilt).float().mean() > 0.9


def test_completions_do_not_depend_on_how_the_batch_is_split():
    pipe, prompts = Pipeline.load(None), scene_prompts(8, 0, 6)
    whole = pipe.complete(pipe.unet, prompts, Sampling(3), seed=1, stream=2)
    parts = pipe.complete(pipe.unet, prompts, Sampling(3), seed=1, stream=2, batch_size=4)
    assert torch.allclose(whole, parts, atol=1e-4)
    late = pipe.complete(pipe.unet, prompts.select([4, 5]), Sampling(3), seed=1, stream=2, first=4)
    assert torch.allclose(whole[4:], late, atol=1e-4)


def test_sample_completes_the_first_held_out_prompts_under_the_text_that_it_is_given():
    asked = sample.SampleConfig(prompt="a red circle", count=3)
    found = sample.requested_prompts(asked, {"held_out": 4}, 32)
    first = scene_prompts(5 * 1_000_003 + 4, 0, 3)
    assert torch.equal(found.images, first.images) and torch.equal(found.masks, first.masks)
    assert found.texts == ["a red circle"] * 3
