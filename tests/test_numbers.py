"""Every number of every command has limits: what lies beyond them is one line that names the flag, before any work."""

import dataclasses
import importlib
import json
import re
import sys
from dataclasses import asdict

import pytest
import torch
from helpers import stops_with
from test_bad_inputs import MODULES, START, one_line
from test_configuration import CONFIGS, SCRIPTS, config_of

import minipref.diffusion
from minipref.pipeline import SHIPPED, Pipeline
from minipref.runtime import checkpoint
from minipref.runtime.config import PICTURES, run_main

NAMES = {module: name for name, module in MODULES.items()} | {name: f"{name}.py" for name in SCRIPTS}
FIELDS = [
    (module, f)
    for module in CONFIGS
    for f in dataclasses.fields(config_of(module))
    if isinstance(f.default, (int, float)) and not isinstance(f.default, bool)
]
# Numbers that may be as large as they like: nothing grows with them but the time that was asked for, or nothing at all.
FREE = {
    "epochs": "one after another", "updates": "one after another", "clip_steps": "one after another",
    "unet_steps": "one after another", "train_steps": "no more than there are, or refused", "eval_every": "a rhythm",
    "val_every": "a rhythm", "patience": "a rhythm", "micro_batch": "no more than there are", "seed": "a name",
    "first_seed": "a name", "held_out": "a name",
}  # fmt: skip


def answers(module, flags, monkeypatch, capsys, tmp_path):
    """Runs a command that must end before it loads a model -> its exit code and what it said."""
    command = NAMES.get(module) or module.rpartition(".")[2].replace("_", "-")
    argv = [*START.get(command, "").split(), *flags]
    main = importlib.import_module(module).main

    def loads(*a, **k):
        raise AssertionError("a model is loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "load", loads)
    monkeypatch.setattr(torch, "load", loads)
    monkeypatch.setattr("claims.run_one", loads)
    monkeypatch.setattr(sys, "argv", [command, *argv])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(command, main if module in SCRIPTS else lambda: main(argv))
    assert not list(tmp_path.iterdir())
    return stop.value.code, capsys.readouterr().err


BEYOND = ["1" + "0" * 30, "-1" + "0" * 30, "9" * 5000, "1e308", "-1e308", "1e999", "nan", "-nan", "inf", "-inf", "-1"]


@pytest.mark.parametrize("module,field", FIELDS, ids=[f"{m} {f.name}" for m, f in FIELDS])
def test_a_number_beyond_every_limit_is_one_line_that_names_its_flag(module, field, monkeypatch, capsys, tmp_path):
    flag = "--" + field.name.replace("_", "-")
    for value in BEYOND:
        if value == "-1" and field.metadata["lo"] <= -1:
            continue  # the run's own, or a score
        code, text = answers(module, [f"{flag}={value}"], monkeypatch, capsys, tmp_path)
        assert code == 2, value
        one_line(text, flag)


COUNTS = [(m, f) for m, f in FIELDS if f.type == "int" and f.metadata["hi"] > PICTURES and f.name not in FREE]


@pytest.mark.parametrize("module,field", COUNTS, ids=[f"{m} {f.name}" for m, f in COUNTS])
def test_a_count_that_no_machine_holds_is_refused_before_any_work(module, field, monkeypatch, capsys, tmp_path):
    """Where the limit of the number itself says nothing."""
    flag = "--" + field.name.replace("_", "-")
    for value in (PICTURES + 1, field.metadata["hi"]):
        code, text = answers(module, [flag, str(value)], monkeypatch, capsys, tmp_path)
        assert code == 2
        one_line(text, flag)


def test_the_free_numbers_are_few_and_the_others_are_looked_at():
    assert set(FREE) <= {f.name for _, f in FIELDS} and len(FIELDS) > 100 and len(COUNTS) >= 12


PRODUCTS = [
    ("train_rl", "--prompts 1000 --samples 101", "--prompts 1000 --samples 101: more than 100,000 pictures"),
    ("train_rl", "--train-steps 7 --sampling-steps 6", "--train-steps 7: a completion has --sampling-steps 6"),
    ("train_rl", "--updates-per-epoch 65", "--updates-per-epoch 65: more than the 64 completions"),
    ("train_rpo", "--train-prompts 1000 --images 101", "--train-prompts 1000 --images 101: more than 100,000"),
    ("train_rpo", "--val-prompts 1000 --val-images 101", "--val-prompts 1000 --val-images 101: more than 100,000"),
    ("train_rpo", "--test-prompts 1000 --test-images 101", "--test-prompts 1000 --test-images 101: more than 100,000"),
    ("minipref.commands.evaluate", "--run x --prompts 1001 --best-of 100", "--prompts 1001 --best-of 100: more than"),
    ("minipref.commands.bench", "--train-steps 11 --sampling-steps 10", "--train-steps 11: a rollout has"),
]


@pytest.mark.parametrize("module,flags,line", PRODUCTS)
def test_numbers_that_do_not_go_together(module, flags, line, monkeypatch, capsys, tmp_path):
    code, text = answers(module, flags.split(), monkeypatch, capsys, tmp_path)
    assert code == 2
    one_line(text, line)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Weights whose noise schedule has ten times, and a run of each script on them that asks for eleven steps."""
    folder, base = tmp_path_factory.mktemp("short"), Pipeline.load(None)
    for name in ("clip.pt", "reward.pt"):
        (folder / name).symlink_to(SHIPPED / name)
    meta = base.meta | {"schedule": asdict(base.schedule.config) | {"num_train_timesteps": 10}}
    checkpoint.save(folder / "unet.pt", "unet", base.unet.config, base.unet.state_dict(), meta=meta)
    meta["base"] = Pipeline.load(folder).fingerprint
    values = {"weights": str(folder), "data": "", "reward": "brightness", "references": "", "seed": 0, "held_out": 0}
    values |= {"eval_prompts": 8, "sampling_steps": 11, "eta": 1.0, "lam_val": 0.5, "guidance": 3.0}
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps(values | {"script": "train_rl.py"}))
    checkpoint.save(folder / "run" / "last.pt", "unet", base.unet.config, base.unet.state_dict(), meta=meta)
    return folder


STEPS = [
    ("train_rl", "--weights {}"), ("train_rl", "--weights {} --reward brightness --train-steps 2"),
    ("train_rl", "--weights {}/run"), ("train_rpo", "--weights {}"), ("train_rpo", "--weights {}/run"),
    ("train_reward", "--weights {}"), ("minipref.commands.sample", "--weights {}"),
    ("minipref.commands.sample", "--weights {} --full --prompt red"), ("minipref.commands.sample", "--run {}/run"),
    ("minipref.commands.evaluate", "--weights {} --prompts 8"),
    ("minipref.commands.evaluate", "--run {}/run --prompts 8"),
]  # fmt: skip


class WithoutNoise:
    """torch, but that it draws no noise."""

    def __getattr__(self, name):
        assert "rand" not in name, "noise is drawn"
        return getattr(torch, name)


@pytest.mark.parametrize("module,flags", STEPS)
def test_more_steps_than_the_schedule_has_are_refused_before_any_noise_is_drawn(
    module, flags, short, monkeypatch, capsys, tmp_path
):
    argv = ["--small"] * (module in SCRIPTS) + ["--sampling-steps", "11", *flags.format(short).split()]
    main = importlib.import_module(module).main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["p", *argv])
    monkeypatch.setattr(minipref.diffusion, "torch", WithoutNoise())
    stops_with(lambda: main() if module in SCRIPTS else main(argv), "--sampling-steps 11: choose 1 to 10", capsys)
    assert not list(tmp_path.iterdir())


LONG = ["x" * 5000, "a\nb" * 200, "\x1b[2J" * 100]


@pytest.mark.parametrize("value", LONG, ids=["letters", "lines", "escapes"])
@pytest.mark.parametrize("flag", ["--trust", "--reward", "--epochs", "--preset", "--bogus"])
def test_an_endless_value_is_one_line_of_bounded_length(flag, value, monkeypatch, capsys, tmp_path):
    if flag == "--reward":
        monkeypatch.setattr("train_rl.load_pipeline", lambda *a, **k: None)
        monkeypatch.setattr(sys, "argv", ["train_rl.py", "--small", flag, value])
        with pytest.raises(SystemExit) as stop:
            run_main("train_rl.py", importlib.import_module("train_rl").main)
        code, text = stop.value.code, capsys.readouterr().err
    else:
        code, text = answers("train_rl", [flag, value], monkeypatch, capsys, tmp_path)
    assert code == 2 and re.match(r"train_rl\.py: .*" + flag, text)
    one_line(text, flag)
