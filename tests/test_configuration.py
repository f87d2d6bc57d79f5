"""Configurations: every field is read, bounded and explained; presets hold deviations; command lines answer clearly."""

import ast
import dataclasses
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from minipref import __main__, runs
from minipref.runtime.config import MOST, opt, parse, run_main, validate

ROOT = Path(__file__).parent.parent
CONFIGS = {
    "train_rl": "RLConfig",
    "train_rpo": "RPOConfig",
    "train_reward": "RewardConfig",
    "minipref.commands.bench": "BenchConfig",
    "minipref.commands.pretrain": "PretrainConfig",
    "minipref.commands.check_data": "CheckConfig",
    "minipref.commands.sample": "SampleConfig",
    "minipref.commands.evaluate": "EvaluateConfig",
    "run": "TutorialConfig",
    "claims": "ClaimsConfig",
}
SCRIPTS = [name for name in CONFIGS if name.startswith("train_")]


def config_of(module):
    return getattr(importlib.import_module(module), CONFIGS[module])


def default(cls, name):
    return next(f.default for f in dataclasses.fields(cls) if f.name == name)


def test_no_other_configuration_is_hidden_anywhere():
    files = [*(ROOT / "minipref").rglob("*.py"), *ROOT.glob("train_*.py"), *ROOT.glob("tutorials/*.py")]
    names = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and re.search(r"= opt\(", ast.unparse(node)):
                names.add(node.name)
    assert names == set(CONFIGS.values())


@pytest.mark.parametrize("module", CONFIGS)
def test_every_config_field_is_read_and_explained(module):
    """Read as `cfg.field` in the code of the script or command itself: none of them is for show."""
    config, tree = config_of(module), ast.parse(Path(sys.modules[module].__file__).read_text(encoding="utf-8"))
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "cfg"}
    for f in dataclasses.fields(config):
        assert f.name in used, f"{module}: --{f.name} is read nowhere"
        assert len(f.metadata["help"]) > 10
    assert config.__dataclass_params__.frozen


@pytest.mark.parametrize("module", CONFIGS)
def test_every_number_has_a_lower_and_an_upper_limit(module):
    """And each value just beyond a limit is refused by name; a limit itself is allowed."""
    config, seen = config_of(module), 0
    for f in dataclasses.fields(config):
        if isinstance(f.default, bool) or f.type in ("str", "bool"):
            assert f.metadata["lo"] is f.metadata["hi"] is None
            continue
        lo, hi, seen = f.metadata["lo"], f.metadata["hi"], seen + 1
        assert isinstance(f.default, (int, float)) and lo is not None and hi is not None, f.name
        assert lo <= f.default <= hi <= MOST and lo < hi, f.name
        for value in (lo, hi):
            validate(config(**{f.name: value}))
        for value in (lo - 1, hi + 1):
            with pytest.raises(ValueError, match=f"^--{f.name.replace('_', '-')} .*: out of range"):
                validate(config(**{f.name: value}))
    assert seen > 0 or module == "minipref.commands.check_data"


@pytest.mark.parametrize("module", [*SCRIPTS, "minipref.commands.pretrain"])
def test_a_preset_holds_deviations_only(module):
    config, presets = config_of(module), importlib.import_module(module).PRESETS
    assert "small" in presets and default(config, "preset") == ""
    for name, values in presets.items():
        validate(config(preset=name, **values))
        same = {k for k, v in values.items() if v == default(config, k)}
        assert not same, f"{module} --{name}: {same} as by default"
        assert "preset" not in values and all(type(v) is type(default(config, k)) for k, v in values.items())


PAPER = {  # PrefPaint Section 5 and its released code; RPO Section 5 and its released code
    "train_rl": {
        "prompts": 16, "samples": 1, "sampling_steps": 50, "eta": 1.0, "train_steps": 5, "updates_per_epoch": 1,
        "lr": 2e-6, "clip_range": 1.64, "trust": "exponential", "kl_weight": 0.0, "guard": 0.0, "ema": 0.0,
    },
    "train_rpo": {
        "lam_train": 0.0, "label_temperature": 1.0, "soft_labels": False, "share_noise": False, "mode": "rpo",
        "updates": 400, "batch_size": 1, "lr": 5e-6, "lam_val": 0.5, "mean": "harmonic", "test_images": 4, "beta": 1.0,
    },
    "train_reward": {
        "features": "clip", "freeze": 0.7, "objective": "regression", "batch_size": 5, "lr": 1e-5, "dim": 256,
        "trust": "paper", "trust_lo": 1.0, "trust_hi": 2.21,
    },
}  # fmt: skip


@pytest.mark.parametrize("module", SCRIPTS)
def test_the_defaults_are_the_papers_values(module):
    config = config_of(module)
    assert {k: default(config, k) for k in PAPER[module]} == PAPER[module]


def test_the_same_thing_has_the_same_name_everywhere():
    """Names that meant one thing here and another there, or two names for one thing, are gone from every command."""
    fields = {name for module in CONFIGS for name in (f.name for f in dataclasses.fields(config_of(module)))}
    assert not fields & {"steps", "sample_steps", "batch", "resume_with", "second_prompts"}
    assert {"sampling_steps", "batch_size", "updates", "updates_per_epoch", "prompt_file", "second_round"} <= fields


# ------------------------------------------------------------------------------------------------ presets, old names


def answer(module, argv, monkeypatch, capsys):
    """The one line with which a script or command ends at once: exit code 2."""
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *argv])
    main = importlib.import_module(module).main
    with pytest.raises(SystemExit) as stop:
        main() if module in SCRIPTS else main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.count("\n") == 1
    return err


@pytest.mark.parametrize("module", [*SCRIPTS, "minipref.commands.pretrain"])
def test_a_training_command_without_a_preset_names_the_presets(module, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for argv in ([], ["--seed", "3"]):
        assert "name a preset: --small; --help lists the flags" in answer(module, argv, monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


def module_of(script):
    return script.removesuffix(".py") if script.endswith(".py") else f"minipref.commands.{script}"


RENAMED = [(script, old, new) for script, table in runs.RENAMED.items() for old, new in table.items()]


@pytest.mark.parametrize("script,old,new", RENAMED)
def test_an_old_flag_is_answered_by_its_new_name(script, old, new, monkeypatch, capsys):
    flag = "--" + old.replace("_", "-")
    for argv in ([flag, "3"], [f"{flag}=3"], ["--threads", "1", flag, "3"]):
        said = answer(module_of(script), argv, monkeypatch, capsys)
        assert said.endswith(f"{flag}: {new}\n" if " " in new else f"{flag}: now --{new.replace('_', '-')}\n")


@pytest.mark.parametrize("script,old,new", [row for row in RENAMED if " " not in row[2]])
def test_a_new_name_is_taken_and_answered_by_nothing(script, old, new):
    """RPO's --updates is a field of its own though RL's was renamed; so is RL's --prompts."""
    config, table = config_of(module_of(script)), runs.RENAMED[script]
    fields = {f.name for f in dataclasses.fields(config)}
    assert new in fields and old not in fields and new not in table
    value = "9" if not isinstance(default(config, new), str) else "x"
    flag, given = f"--{new.replace('_', '-')}", {"prog": "p", "description": "", "renamed": table}
    assert str(getattr(parse(config, [flag, value], **given), new)) == value


def test_the_table_of_renamed_flags_names_every_command_that_has_them():
    scripts = {"train_rl.py", "train_rpo.py", "train_reward.py"}
    assert set(runs.RENAMED) == scripts | {"pretrain", "sample", "evaluate", "bench"}
    assert len(RENAMED) == 16


@pytest.mark.parametrize("old,new", [("tutorial", "tutorials/run.py NUMBER"), ("claims", "tutorials/claims.py")])
def test_a_command_that_has_moved_is_answered_by_its_place(old, new, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minipref", old, "3"])
    with pytest.raises(SystemExit) as stop:
        run_main("minipref", __main__.main)
    assert stop.value.code == 2 and f"{old}: now python {new}, in a clone" in capsys.readouterr().err


def test_every_command_is_a_file_with_a_main():
    for name in __main__.COMMANDS:
        assert callable(importlib.import_module(f"minipref.commands.{name.replace('-', '_')}").main)


# ------------------------------------------------------------------------------------------------ command lines


@dataclasses.dataclass(frozen=True)
class Example:
    preset: str = opt("", "named set of values")
    lr: float = opt(0.1, "learning rate", lo=0, hi=1)
    steps: int = opt(5, "number of steps", lo=1)
    kind: str = opt("a", "which kind", choices=("a", "b"))
    quick: bool = opt(False, "whether to hurry")


PRESETS = {"small": {"steps": 7}, "large": {"steps": 70, "lr": 0.5}}


OLD = {"length": "steps", "fast": "quick", "kind": "lr"}  # the last: an old name that now is another field's


def parsed(*argv, presets=None):
    return parse(Example, list(argv), prog="example.py", description="", presets=presets, renamed=OLD)


def test_flags_override_presets_and_presets_override_defaults():
    small, large = (Example(preset=name, **PRESETS[name]) for name in PRESETS)
    assert parsed() == Example() and parsed("--no-quick", "--kind", "b") == Example(kind="b")
    assert parsed("--small", presets=PRESETS) == small == parsed("--preset", "small", presets=PRESETS)
    assert small == Example(preset="small", steps=7) and large == Example(preset="large", lr=0.5, steps=70)
    changed = parsed("--large", "--lr", "0.2", "--quick", presets=PRESETS)
    assert changed == dataclasses.replace(large, lr=0.2, quick=True)
    assert parsed("--lr", "0.2", "--large", presets=PRESETS).lr == 0.2  # whatever their order


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--lrr", "1"], "unrecognized arguments: --lrr"),
        (["--ste", "1"], "unrecognized arguments: --ste"),
        (["--lr", "2"], "--lr 2.0: out of range, allowed are 0 to 1"),
        (["--lr", "nan"], "--lr nan: not a finite number"),
        (["--steps", "0"], "--steps 0: out of range"),
        (["--steps", "x"], "argument --steps: invalid int value"),
        (["--kind", "c"], "--kind c: choose from a, b"),
        (["--kind", ""], "--kind: an empty value; leave the flag out"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--steps", "1000000001"], "--steps 1000000001: out of range, allowed are 1 to 1000000000"),
        (["--length", "3"], "example.py: --length: now --steps"),
        (["--length=3"], "example.py: --length: now --steps"),
        (["--no-fast"], "example.py: --no-fast: now --quick"),
    ],
)
def test_a_wrong_flag_is_one_clear_line_and_exit_code_two(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--small", *argv, presets=PRESETS)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and message in text and text.count("\n") == 1 and text.startswith("example.py: ")


def test_errors_that_a_user_can_mend_are_one_line(capsys):
    def broken():
        raise ValueError("a line\n  and another")

    with pytest.raises(SystemExit) as stop:
        run_main("example.py", broken)
    assert stop.value.code == 2 and capsys.readouterr().err == "example.py: a line and another\n"

    with pytest.raises(SystemExit) as stop:
        run_main("example.py", lambda: torch.empty(1 << 60))  # more than any machine has
    assert stop.value.code == 2 and "example.py: out of memory; ask for fewer pictures" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="shape"):  # a fault of ours keeps its traceback
        run_main("example.py", lambda: torch.zeros(2).view(3))
