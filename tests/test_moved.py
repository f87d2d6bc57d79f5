"""A run that was moved, stopped early or trained on from: its base model, its pictures and its weights are the right
ones, or one line says what is missing."""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import rpo_weights, stops_with, train_rpo_tiny, train_tiny
from PIL import Image

import train_reward
import train_rl
import train_rpo
from minipref.commands import evaluate, sample
from minipref.pipeline import SHIPPED, Pipeline, load_unet
from minipref.runs import judged_by, load_pipeline, load_run
from minipref.runtime import checkpoint

FEW = dict.fromkeys("updates train_prompts images val_prompts val_images test_prompts test_images".split(), 1)
FEWEST = {"epochs": 1, "prompts": 2, "sampling_steps": 2, "train_steps": 1, "eval_every": 9}
TINY = ["--prompts", "8", "--best-of", "1", "--sampling-steps", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a base model and pictures of one's own, and a run on them that names both."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "base").mkdir()
    (folder / "pictures" / "deep").mkdir(parents=True)
    shutil.copy(SHIPPED / "clip.pt", folder / "base")
    content = torch.load(SHIPPED / "unet.pt", weights_only=True)
    content["state"]["conv_out.bias"] += 0.01
    torch.save(content, folder / "base" / "unet.pt")
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(folder / "pictures" / "deep" / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # named relative to where one stands
        train_tiny(folder / "run", patch, epochs=1, reward="brightness", weights="base", data="pictures")
    return folder


@pytest.fixture
def moved(home, tmp_path, monkeypatch):
    """The same three under other names in another place; the first is gone."""
    for name in ("base", "pictures", "run"):
        shutil.copytree(home / name, tmp_path / f"new_{name}")
    config = (tmp_path / "new_run" / "config.json").read_text()
    (tmp_path / "new_run" / "config.json").write_text(config.replace(str(home), str(tmp_path / "gone")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(*flags):
    yield lambda: sample.main(["--run", "new_run", "--count", "1", "--sampling-steps", "2", *flags])
    yield lambda: evaluate.main(["--run", "new_run", *TINY, *flags])


def test_a_run_names_its_places_in_full_and_which_pictures_they_hold(home):
    config = json.loads((home / "run" / "config.json").read_text())
    assert config["weights"] == str(home / "base") and config["data"] == str(home / "pictures")
    assert len(config["pictures"]) == 16


def test_a_moved_run_is_told_where_its_base_and_its_pictures_lie(moved, capsys):
    """What it then draws and reports is what it would have at home."""
    for call in commands("--weights", "new_base", "--data", "new_pictures"):
        call()
    assert "WinRate by reward" in capsys.readouterr().out
    assert (moved / "new_run" / "sample.png").is_file() and (moved / "new_run" / "evaluation.png").is_file()


@pytest.mark.parametrize(
    "flags,line",
    [
        ("", "gone/base: the base model of new_run is not there; say where by --weights, or in new_run/config.json"),
        ("--weights new_base", "gone/pictures: the run's pictures do not lie there; say by --data where they do"),
        ("--weights nowhere --data new_pictures", "nowhere: no such folder of weights"),
        ("--weights shipped --data new_pictures", "new_run/last.pt: was trained from another base model than shipped"),
        ("--weights new_run --data new_pictures", "new_run: a run that cannot be started from"),
        ("--weights new_base --data nowhere", "nowhere: the run's pictures do not lie there"),
        ("--weights new_base --data new_base", "new_base: holds other pictures than the run had"),
        ("--weights new_base --data fewer", "fewer: holds other pictures than the run had"),
        ("--weights new_base --data renamed", "renamed: holds other pictures than the run had"),
        ("--weights new_base --data changed", "changed: holds other pictures than the run had"),
    ],
)
def test_a_wrong_place_is_refused_in_one_line(flags, line, moved, capsys):
    (moved / "shipped").symlink_to(SHIPPED)
    for name in ("fewer", "renamed", "changed"):
        shutil.copytree(moved / "new_pictures", moved / name)
    (moved / "fewer" / "deep" / "3.png").unlink()
    (moved / "renamed" / "deep" / "3.png").rename(moved / "renamed" / "deep" / "33.png")
    Image.new("RGB", (32, 32), "red").save(moved / "changed" / "deep" / "3.png")
    for call in commands(*flags.split()):
        stops_with(call, line, capsys)


def test_other_files_beside_the_pictures_do_not_matter(moved):
    (moved / "new_pictures" / "notes.txt").write_text("taken in May")
    (moved / "new_pictures" / ".DS_Store").write_text("")
    next(commands("--weights", "new_base", "--data", "new_pictures"))()


def test_pictures_belong_to_a_run_that_had_some(run, moved, capsys):
    flags = ["--data", "new_pictures"]
    for command in (sample.main, evaluate.main):
        stops_with(lambda c=command: c(["--run", str(run[0]), *flags]), "--data new_pictures: ", capsys)
    stops_with(lambda: sample.main(flags), "--data: belongs to a run", capsys)


def test_a_run_that_was_trained_on_from_another_names_the_one_that_lacks_its_base(moved, capsys):
    """`--weights` speaks of the outer one; the inner one's place stands in its own configuration."""
    (moved / "outer").mkdir()
    config = json.loads((moved / "new_run" / "config.json").read_text())
    (moved / "outer" / "config.json").write_text(json.dumps(config | {"weights": "gone_run"}))
    shutil.copy(moved / "new_run" / "last.pt", moved / "outer")
    for flags, line in (([], "gone_run: the base model of outer is"), (["--weights", "new_run"], "in new_run/config")):
        stops_with(lambda f=flags: sample.main(["--run", "outer", *f]), line, capsys)


# ------------------------------------------------------------------------------------------------ stopped early


def part_of(run, folder, *names):
    """A copy of a run with only these weights."""
    folder.mkdir()
    for name in ("config.json", *names):
        shutil.copy(run / name, folder)
    return folder


@pytest.mark.parametrize("names", [("best.pt",), ("last.pt",)])
def test_what_a_stopped_run_has_written_is_used_and_named(names, run, tmp_path, capsys):
    folder = part_of(run[0], tmp_path / "part", *names)
    assert judged_by(folder) + ".pt" == names[0]
    sample.main(["--run", str(folder), "--count", "1", "--sampling-steps", "2"])
    assert f"aligned: {names[0]}" in capsys.readouterr().out
    evaluate.main(["--run", str(folder), *TINY])
    assert f"{folder}, {names[0]}" in capsys.readouterr().out
    other = {"best.pt": "last", "last.pt": "best"}[names[0]]
    line = f"{folder / other}.pt: no such checkpoint; {names[0]} lies there"
    for call in (sample.main, evaluate.main):
        stops_with(lambda c=call: c(["--run", str(folder), "--checkpoint", other]), line, capsys)


def test_a_run_without_weights_says_that_it_was_stopped_too_early(run, tmp_path, capsys):
    folder = part_of(run[0], tmp_path / "part")
    line = f"{folder / 'last.pt'}: no such checkpoint; the run was stopped before its first evaluation"
    for call in (sample.main, evaluate.main):
        stops_with(lambda c=call: c(["--run", str(folder)]), line, capsys)


@pytest.mark.parametrize("script,stopped,name", [
    ("train_rl.py", False, "last"), ("train_rl.py", True, "best"), ("train_rpo.py", False, "best"),
])  # fmt: skip
def test_where_both_are_there_those_of_the_runs_own_judgement_count(script, stopped, name, tmp_path):
    for file in ("last.pt", "best.pt"):
        (tmp_path / file).touch()
    (tmp_path / "config.json").write_text(json.dumps({"script": script}))
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1, "stopped": true}\n'[: None if stopped else 13])
    assert judged_by(tmp_path) == name
    (tmp_path / f"{name}.pt").unlink()
    assert judged_by(tmp_path) == {"last": "best", "best": "last"}[name]


# ------------------------------------------------------------------------------------------------ trained on from


def near(a, b):
    return all(torch.allclose(a[k].float(), b[k].float(), atol=1e-5) for k in a)


@pytest.fixture(params=["train_rl.py", "train_rpo.py"])
def start(request, tmp_path):
    """-> a run of either script, and the weights that it speaks of: last of RL, best of RPO."""
    base, folder = Pipeline.load(None), tmp_path / "start"
    folder.mkdir()
    values = {"weights": "", "data": "", "reward": "brightness", "references": "", "seed": 0, "held_out": 0}
    values |= {"eval_prompts": 8, "sampling_steps": 2, "eta": 1.0, "lam_val": 0.5, "guidance": 3.0}
    (folder / "config.json").write_text(json.dumps(values | {"script": request.param}))
    meta, weights = {"schedule": asdict(base.schedule.config), "base": base.fingerprint}, {}
    for i, name in enumerate(("last", "best")):
        weights[name] = {k: v + 0.01 * (1 + i) * (k == "conv_out.bias") for k, v in base.unet.state_dict().items()}
        checkpoint.save(folder / f"{name}.pt", "unet", base.unet.config, weights[name], meta=meta)
    return str(folder), weights["best" if request.param == "train_rpo.py" else "last"]


def test_a_run_is_a_base_of_its_own(start):
    """What is trained from it belongs to the very file that was taken, not to that run's own base."""
    folder, weights = start
    pipe = load_pipeline(folder, "cpu")
    name = (
        "best.pt" if json.loads((Path(folder) / "config.json").read_text())["script"] == "train_rpo.py" else "last.pt"
    )
    assert pipe.fingerprint == hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest()[:16]
    assert near(pipe.unet.state_dict(), weights)


@pytest.mark.slow
def test_training_begins_with_the_runs_weights(start, tmp_path, monkeypatch):
    """At a tiny learning rate the new run's weights are those that it began with; a run on that run opens, too."""
    folder, weights = start
    train_tiny(tmp_path / "rl", monkeypatch, weights=folder, lr=1e-9, ema=0, reward="brightness", **FEWEST)
    assert near(load_unet(tmp_path / "rl" / "last.pt")[0].state_dict(), weights)
    train_rpo_tiny(tmp_path / "rpo", weights=tmp_path / "rl", lr=1e-9, **FEW)
    assert near(rpo_weights(tmp_path / "rpo"), weights)
    _, pipe, _ = load_run(str(tmp_path / "rpo"), "", "cpu", "train_rpo.py")
    assert near(pipe.unet.state_dict(), weights)


def test_rated_are_completions_of_the_runs_weights(start, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def rate(folder, pipe, unet, *more, **kinds):
        assert near(pipe.unet.state_dict(), start[1]) and unet is pipe.unet
        raise Seen

    monkeypatch.setattr(train_reward, "rate", rate)
    flags = ["--small", "--weights", str(start[0]), "--out", str(tmp_path / "reward")]
    monkeypatch.setattr("sys.argv", ["train_reward.py", *flags])
    with pytest.raises(Seen):
        train_reward.main()


@pytest.mark.parametrize("module,arguments", [
    (sample, ["--count", "1", "--sampling-steps", "2", "--out", "x.png"]), (evaluate, TINY[:2] + TINY[4:]),
])  # fmt: skip
def test_drawn_and_judged_are_the_runs_weights(module, arguments, start, tmp_path, monkeypatch):
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_pipeline", lambda *a: seen.append(load_pipeline(*a)) or seen[0])
    module.main(["--weights", str(start[0]), *arguments])
    assert near(seen[0].unet.state_dict(), start[1])


@pytest.mark.parametrize(
    "config",
    [
        train_rl.RLConfig,
        train_rpo.RPOConfig,
        train_reward.RewardConfig,
        sample.SampleConfig,
        evaluate.EvaluateConfig,
    ],
)
def test_the_help_says_that_a_run_serves_as_weights(config):
    assert ", or a run" in config.__dataclass_fields__["weights"].metadata["help"]
