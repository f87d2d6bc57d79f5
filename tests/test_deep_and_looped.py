"""JSON and checkpoints nested a hundred thousand times, and links that lead back to themselves: one line with the
name of the file or flag, wherever a command reads a file or a folder."""

import importlib
import shlex
import shutil
import sys
import zipfile

import claims
import numpy as np
import pytest
import torch
from PIL import Image
from test_bad_inputs import MODULES, START, one_line, runs
from test_configuration import CONFIGS, config_of

from minipref.pipeline import SHIPPED, Pipeline
from minipref.runtime.config import run_main

DEPTH = 100_000
DEEP = {"objects": '{"a": ' * DEPTH, "lists": "[" * DEPTH + "]" * DEPTH}


def nested_checkpoint(source, goal, key, inner=None):
    """A copy of a checkpoint in whose config or meta `key` is nested: written as a pickle, which Python cannot."""
    content = torch.load(source, weights_only=True)
    place = content["meta"] if key in ("schedule", "words", "clip", "base") else content["config"]
    place[key] = {inner: "DEEP"} if inner else "DEEP"
    torch.save(content, goal.with_suffix(".flat"))
    lists = b"]" * DEPTH + b"a" * (DEPTH - 1)
    with zipfile.ZipFile(goal.with_suffix(".flat")) as old, zipfile.ZipFile(goal, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                assert data.count(b"X\x04\x00\x00\x00DEEP") == 1
                data = data.replace(b"X\x04\x00\x00\x00DEEP", lists)
            new.writestr(name, data)
    goal.with_suffix(".flat").unlink()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("looped")
    base = Pipeline.load(None)
    (folder / "bad_runs").mkdir()
    runs(folder / "bad_runs", base)
    for name in ("run", "rpo"):
        shutil.copytree(folder / "bad_runs" / name, folder / name)
    shutil.rmtree(folder / "bad_runs")
    (folder / "pictures").mkdir()
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(folder / "pictures" / f"{i}.png")
    for name, text in DEEP.items():
        for kind in ("run", "ratings", "layout", "study", "trained"):
            (folder / f"{kind}_{name}").mkdir()
        (folder / f"run_{name}" / "config.json").write_text(text)
        shutil.copy(folder / "run" / "last.pt", folder / f"run_{name}")
        (folder / f"ratings_{name}" / "ratings.jsonl").write_text(text + "\n")
        (folder / f"layout_{name}" / "ratings.json").write_text(text)
        (folder / f"layout_{name}" / "inpaint").mkdir()
        (folder / f"trained_{name}" / "pretrain.json").write_text(text)
    for key in ("schedule", "clip", "block_out_channels", "sample_size"):
        (folder / f"deep_{key}").mkdir()
        nested_checkpoint(SHIPPED / "unet.pt", folder / f"deep_{key}" / "unet.pt", key)
        (folder / f"deep_{key}" / "clip.pt").symlink_to(SHIPPED / "clip.pt")
    for key in ("words", "vocab_size"):
        (folder / f"deep_{key}").mkdir()
        nested_checkpoint(SHIPPED / "clip.pt", folder / f"deep_{key}" / "clip.pt", key)
        (folder / f"deep_{key}" / "unet.pt").symlink_to(SHIPPED / "unet.pt")
    shutil.copytree(folder / "run", folder / "deep_base")
    nested_checkpoint(folder / "run" / "last.pt", folder / "deep_base" / "last.pt", "base")
    for name in ("loop", "loop.png"):
        (folder / name).symlink_to(name)
    (folder / "round").symlink_to("about")
    (folder / "about").symlink_to("round")
    return folder


def listing(folder):
    """Every path below a folder, with when and how large it was written."""
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def shipped():
    """Pipeline.load that reads the shipped weights once."""
    load, base = Pipeline.load, Pipeline.load(None)
    return staticmethod(lambda weights, device="cpu": load(weights, device) if weights else base)


@pytest.fixture(autouse=True)
def _quick(shipped, monkeypatch):
    monkeypatch.setattr(Pipeline, "load", shipped)


@pytest.fixture(scope="module")
def before(place):
    return listing(place)


def answers(command, arguments, name, place, before, monkeypatch, capsys):
    """The command ends in one line that holds `name`, and changes nothing."""
    module = MODULES.get(command) or command.removesuffix(".py")
    if module == command and "/" not in command:
        module = f"minipref.commands.{command.replace('-', '_')}"
    argv = shlex.split(f"{START.get(command, '')} {arguments}")
    main = importlib.import_module(module).main
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", [command, *argv])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(command, main if command.startswith("train_") else lambda: main(argv))
    text = capsys.readouterr().err
    assert stop.value.code == 2, text
    one_line(text, name)
    assert listing(place) == before


READERS = [  # a command and what it reads: "{}" is the way in which it is deep
    ("sample", "--run run_{}", "run_{}/config.json"), ("evaluate", "--run run_{}", "run_{}/config.json"),
    ("sample", "--weights run_{}", "run_{}/config.json"), ("train_rl.py", "--weights run_{}", "run_{}/config.json"),
    ("train_rpo.py", "--weights run_{}", "run_{}/config.json"),
    ("train_reward.py", "--weights run_{}", "run_{}/config.json"),
    ("train_reward.py", "--policies run_{}", "run_{}/config.json"),
    ("train_reward.py", "--second-round run_{}", "run_{}/config.json"),
    ("train_reward.py", "--ratings ratings_{}", "ratings_{}"), ("check-data", "ratings_{}", "ratings_{}"),
    ("check-data", "ratings_{}/ratings.jsonl", "ratings_{}"), ("check-data", "layout_{}", "layout_{}"),
    ("check-data", "layout_{}/ratings.json", "layout_{}/ratings.json"),
    ("train_reward.py", "--ratings layout_{}", "layout_{}"),
    ("pretrain", "--out trained_{}", "trained_{}/pretrain.json"),
]  # fmt: skip


@pytest.mark.parametrize("way", DEEP)
@pytest.mark.parametrize("command,arguments,name", READERS)
def test_deep_json_is_one_line(way, command, arguments, name, place, before, monkeypatch, capsys):
    answers(command, arguments.format(way), name.format(way), place, before, monkeypatch, capsys)


@pytest.mark.parametrize("way", DEEP)
@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
def test_deep_json_of_a_studys_run_is_one_line(way, name, tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n')
    assert claims.run_one(tmp_path, "train_rl.py", []) == {"rows": [{"epoch": 0}]}
    (tmp_path / name).write_text(DEEP[way])
    with pytest.raises(ValueError, match=f"{name}: not readable as "):
        claims.run_one(tmp_path, "train_rl.py", [])


KEYS = ["schedule", "block_out_channels", "sample_size", "words", "vocab_size"]
CASES = [(key, "sample") for key in KEYS] + [(KEYS[0], c) for c in ("evaluate", *START) if c != "pretrain"]


@pytest.mark.parametrize("key,command", CASES)
def test_a_deep_checkpoint_is_one_line(key, command, place, before, monkeypatch, capsys):
    file = "clip.pt" if key in ("words", "vocab_size") else "unet.pt"
    answers(command, f"--weights deep_{key}", f"deep_{key}/{file}", place, before, monkeypatch, capsys)


def test_a_deep_fingerprint_is_another_base(place, before, monkeypatch, capsys):
    for command in ("sample", "evaluate"):
        answers(command, "--run deep_base", "deep_base/last.pt", place, before, monkeypatch, capsys)
    answers("train_rl.py", "--weights deep_clip", "deep_clip", place, before, monkeypatch, capsys)


# Every flag that names a file or a folder, with what it needs beside it. The last word is the loop.
PATHS = {
    "train_rl": ["--weights", "--data", "--out", "--reward model:"],
    "train_rpo": ["--weights", "--class-name dog --references", "--out",
                  "--references pictures --class-name dog --prompt-file"],
    "train_reward": ["--weights", "--ratings", "--second-round", "--policies", "--out"],
    "minipref.commands.sample": ["--run", "--weights", "--run run --weights", "--image",
                                 "--image pictures/0.png --mask", "--out"],
    "minipref.commands.evaluate": ["--run", "--weights", "--run run --weights", "--run run --data"],
    "minipref.commands.check_data": ["", "--path"],
    "minipref.commands.pretrain": ["--out", "--only clip --out new --start-from"],
    "minipref.commands.bench": ["--out"],
    "run": ["1 --exercise 1 --answer"],
    "claims": ["--out"],
}  # fmt: skip
NO_PATH = "preset class_name reference_prompt mode mean image_encoder device reward trust features objective checkpoint"
NO_PATH += " prompt only part size study flags data"  # `data` of sample: belongs to a run that had some


def test_every_flag_that_names_a_place_is_in_the_table():
    for module in CONFIGS:
        named = " ".join(PATHS[module]).replace("-", "_")
        for name, kind in config_of(module).__annotations__.items():
            assert kind != "str" or name in NO_PATH.split() or f"__{name}" in named, f"{module}: --{name}"


COMMANDS = {module: name for name, module in MODULES.items()}
LOOPS = [(m, flags, goal) for m, every in PATHS.items() for flags in every for goal in ("loop", "round/x")]


@pytest.mark.parametrize("module,flags,goal", LOOPS)
def test_a_link_that_leads_to_itself_is_one_line(module, flags, goal, place, before, monkeypatch, capsys):
    command = COMMANDS.get(module) or module.rpartition(".")[2].replace("_", "-")
    command = f"{module}.py" if module.startswith("train_") else command
    arguments = f"{flags}{'' if flags.endswith(':') else ' '}{goal}"
    if module == "minipref.commands.sample" and flags == "--out":
        arguments += ".png"
    answers(command, arguments, goal, place, before, monkeypatch, capsys)
