"""Values out of range in files from elsewhere, pipes where files should lie, commas in names, output that is lost."""

import json
import os
import subprocess
import sys

import claims
import numpy as np
import pytest
import run as tutorial
from helpers import schedule, stops_with
from PIL import Image

from minipref.commands import check_data, evaluate, pretrain
from minipref.data import rating_files, subjects
from minipref.runs import KEYS, _within, load_run, read_config
from minipref.runtime.config import run_main, several
from minipref.runtime.runlog import progress, read_text

SCORES = {"structure": 5, "texture": 6, "overall": 5}
CONFIG = {
    "script": "train_rl.py", "weights": "", "data": "", "reward": "brightness", "seed": 0, "held_out": 0,
    "eval_prompts": 8, "sampling_steps": 2, "eta": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "key,value",
    [("eta", 5), ("eta", -1), ("eta", float("nan")), ("sampling_steps", 10**30), ("sampling_steps", -1), ("seed", -1),
     ("eval_prompts", -8), ("held_out", -1), ("seed", True), ("weights", 3), ("script", ["x"])],
)  # fmt: skip
def test_a_run_out_of_range_names_the_file_and_the_key(key, value, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    stops_with(lambda: load_run(str(tmp_path), "", "cpu"), f"{tmp_path / 'config.json'}: {key} is ", capsys)


def test_a_run_as_scripts_write_it_is_in_range(tmp_path):
    assert all(_within(CONFIG[key], limits) for key, limits in KEYS["train_rl.py"].items())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert read_config(tmp_path) == CONFIG


def test_a_moved_run_is_told_by_what_can_be_done(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"weights": "gone"}))
    where = tmp_path / "config.json"
    stops_with(lambda: load_run(str(tmp_path), "", "cpu"), f'say where by "weights" in {where}', capsys)
    stops_with(lambda: load_run(str(tmp_path), "", "cpu", weights=""), f"by --weights, or in {where}", capsys)


@pytest.mark.parametrize(
    "changes",
    [{"num_train_timesteps": n} for n in (-1, 0, 10**12)]
    + [{"beta_schedule": "linear", k: v} for k in ("beta_start", "beta_end") for v in (float("nan"), -0.1, 0.0, 1.5)]
    + [{"steps_offset": 1000}, {"steps_offset": -1}],
)
def test_a_noise_schedule_has_limits(changes):
    with pytest.raises(ValueError, match=list(changes)[-1]):
        schedule(**changes)


@pytest.mark.parametrize("kind", ["fifo", "folder", "binary"])
def test_what_is_no_text_file_is_named(kind, tmp_path, capsys):
    path = tmp_path / "provenance.txt"
    {"fifo": os.mkfifo, "folder": os.mkdir, "binary": lambda p: p.write_bytes(b"\xff\xfe\x00")}[kind](path)
    stops_with(lambda: read_text(path), str(path), capsys)
    stops_with(lambda: tutorial.try_exercise(5, 1, path), str(path), capsys)
    stops_with(lambda: claims.main(["--out", str(tmp_path)]), f"--out {tmp_path}", capsys)
    (tmp_path / "inpaint").mkdir()
    path.rename(tmp_path / "r.json")
    stops_with(lambda: rating_files.scan(tmp_path), "r.json", capsys)


def test_a_study_overwrites_nothing_that_it_did_not_make(tmp_path, capsys):
    (tmp_path / "claims.md").write_text("mine")
    stops_with(lambda: claims.main(["--out", str(tmp_path)]), "no provenance.txt", capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["claims.md"] and (tmp_path / "claims.md").read_text() == "mine"


def rated(folder):
    """A folder with one rated picture."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(folder / "x.png")
    noise[8:20] = 128
    Image.fromarray(noise).save(folder / "m.png")
    row = {"image": "x.png", "masked": "m.png", "prompt_id": "a", "scores": SCORES}
    (folder / "ratings.jsonl").write_text(json.dumps(row) + "\n")
    return folder, row


def test_a_name_may_hold_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rated(tmp_path / "a,b")
    assert several("a,b") == ["a,b"] and several("c,d") == ["c", "d"] and several("") == []
    folder = tmp_path / "a,b"
    for paths in ("a,b", folder, [folder]):
        assert len(rating_files.scan(paths)[0]) == 1
    with pytest.raises(FileNotFoundError, match="c,d: no such folder"):
        rating_files.scan(tmp_path / "c,d")  # a run's own folder is never split
    rated(tmp_path / "c")
    assert len(rating_files.scan([folder, tmp_path / "c"])[0]) == 2
    assert check_data.holds_ratings(tmp_path / "a,b")


def test_a_row_with_a_name_too_long_is_left_out_alone(tmp_path):
    folder, row = rated(tmp_path / "r")
    bad = [row | {"image": "x" * 5000}, row | {"origin": "y" * 5000}, row | {"scores": "z" * 5000}]
    (folder / "ratings.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*bad, row]))
    rows, problems = rating_files.scan(folder)
    assert len(rows) == 1 and all(f"ratings.jsonl:{i + 1}: " in "".join(problems) for i in range(3))
    assert all(len(x) < 300 for x in problems if "y" * 9 in x or "z" * 9 in x)


@pytest.mark.parametrize("lines", ["raise BaseException('x')", "raise GeneratorExit"])
def test_no_answer_ends_its_check(lines, tmp_path):
    with pytest.raises(tutorial.Left, match="is no answer"):
        tutorial.execute(lines, {}, tmp_path / "x", 1)


def test_lists_of_prompts_cannot_steer_a_terminal(tmp_path, capsys):
    path = tmp_path / "prompts_and_classes.txt"
    path.write_text("mug,mug\x1b[2Jall is well\n")
    stops_with(lambda: subjects.dreambench_class(path, "mug"), f"{path}: holds a control character", capsys)
    path.write_text("mug,a\u00a0mug\n")
    assert subjects.dreambench_class(path, "mug") == "a mug"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_is_lost_is_an_error_and_a_closed_pipe_is_not(unbuffered):
    code = "import sys; from minipref.runtime.config import run_main; run_main('p', lambda: print('x'))"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    kinds = {"env": environment, "stderr": subprocess.PIPE, "text": True}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, **kinds)
    assert done.returncode == 2 and done.stderr == "p: what it printed could not be written (No space left on device)\n"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, **kinds)
    os.close(writer)
    assert done.returncode == 0 and not done.stderr


def test_the_message_is_the_last_line(capsys):
    with pytest.raises(SystemExit):
        run_main("p", lambda: [int("x") for _ in progress(range(3), "work")])
    assert capsys.readouterr().err.splitlines()[-1].startswith("p: invalid literal")


def test_a_folder_that_cannot_be_written_to_names_its_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for call in (claims.main, lambda argv: pretrain.main(["--small", *argv])):
        line = f"--out {tmp_path / 'x' / 'y'}: {tmp_path} is no folder that can be written to"
        stops_with(lambda c=call: c(["--out", str(tmp_path / "x" / "y")]), line, capsys)
    assert not list(tmp_path.iterdir())


def test_the_table_is_printed_before_it_is_written(tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr(evaluate, "run_report", lambda cfg: ("| a table |", None, None, None))
    monkeypatch.setattr(evaluate, "write_text", fails)
    with pytest.raises(OSError, match="full"):
        evaluate.main(["--run", str(tmp_path)])
    assert "| a table |" in capsys.readouterr().out
