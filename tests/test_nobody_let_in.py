"""Files from elsewhere, runs, pictures, ratings, lists of prompts, can neither run code, nor write elsewhere, nor speak
for the program."""

import json
import os
import re
import shutil
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import stops_with
from PIL import Image

from minipref.commands import check_data, evaluate, sample
from minipref.data import pictures, rating_files, subjects
from minipref.pipeline import Pipeline
from minipref.runs import load_pipeline
from minipref.runtime import checkpoint
from minipref.runtime.checkpoint import atomic_write, protect
from minipref.runtime.config import printable

ROOT = Path(__file__).parent.parent
CONFIG = {
    "script": "train_rl.py", "weights": "", "data": "", "reward": "brightness", "seed": 0, "held_out": 0,
    "eval_prompts": 8, "sampling_steps": 2, "eta": 1.0,
}  # fmt: skip
TINY = ["--prompts", "8", "--best-of", "1", "--sampling-steps", "2"]


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """-> a function that makes a run with this reward, and in it a module that leaves a mark when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    base = Pipeline.load(None)
    meta = {"schedule": asdict(base.schedule.config), "base": base.fingerprint}

    def make(reward="brightness", name="stored_run"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIG | {"reward": reward}))
        checkpoint.save(folder / "last.pt", "unet", base.unet.config, base.unet.state_dict(), meta=meta)
        code = "open('mark', 'w')\ndef f(images, prompts):\n    return images.mean((1, 2, 3))\n"
        (folder / "payload.py").write_text(code)
        return folder

    return make


# ------------------------------------------------------------------------------------------------ code


@pytest.mark.parametrize(
    "reward",
    [
        "stored_run.payload:f",
        "brightness+stored_run.payload:f",
        "0.5*stored_run.payload:f",
        "model+2*stored_run.payload:f+brightness",
    ],
)
def test_a_function_that_only_a_file_names_is_not_imported(reward, foreign, capsys):
    run = foreign(reward)
    stops_with(lambda: evaluate.main(["--run", str(run), *TINY]), "say by --reward that it may be imported", capsys)
    stops_with(
        lambda: evaluate.main(["--run", str(run), "--reward", "brightness", *TINY]), "the run's reward is", capsys
    )
    other = reward.replace("payload:f", "payload:g")
    stops_with(lambda: evaluate.main(["--run", str(run), "--reward", other, *TINY]), "the run's reward is", capsys)
    sample.main(["--run", str(run), "--count", "1"])
    load_pipeline(str(run), "cpu")  # a run to train on from
    assert not Path("mark").exists()


def test_a_function_that_the_command_line_names_is_imported_where_it_is_the_runs(foreign, capsys):
    run = foreign("0.5 * stored_run.payload:f + brightness")
    evaluate.main(["--run", str(run), "--reward", "0.5*stored_run.payload:f+brightness", *TINY])
    assert Path("mark").exists() and "WinRate by reward" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["brightness", "jpeg_size+brightness"])
def test_what_needs_no_import_needs_no_word(name, foreign, capsys):
    evaluate.main(["--run", str(foreign(name)), *TINY])
    assert "WinRate by reward" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ writing elsewhere


def text(path):
    path.write_text("ours")


@pytest.mark.parametrize("link", ["samples", "sample/deeper", "a/b/c"])
def test_nothing_is_written_through_a_link_inside_a_run_folder(link, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run / link).parent.mkdir(parents=True)
    (run / link).symlink_to(elsewhere)
    protect(run)
    for path in (run / link / "x.txt", run / link / "new" / "x.txt", run / "q" / ".." / link / "x.txt"):
        with pytest.raises(ValueError, match=f"{link}: is a link"):
            atomic_write(path, text)
    assert not list(elsewhere.iterdir())


def test_a_run_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "scratch" / "run").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    protect(tmp_path / "runs" / "run")
    atomic_write(tmp_path / "runs" / "run" / "samples" / "x.txt", text)
    assert (tmp_path / "scratch" / "run" / "samples" / "x.txt").read_text() == "ours"


def test_a_file_that_is_a_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    for name in ("evaluation.md", ".evaluation.tmp.md", ".evaluation.md.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "theirs")
    atomic_write(tmp_path / "evaluation.md", text)
    assert (tmp_path / "theirs").read_text() == "theirs" and not (tmp_path / "evaluation.md").is_symlink()
    assert (tmp_path / ".evaluation.tmp.md").is_symlink()


def test_temporary_names_differ_every_time_and_the_folder_is_flushed(tmp_path, monkeypatch):
    names, flushed = [], []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.path.isdir(f"/proc/self/fd/{handle}")))
    for _ in range(8):
        atomic_write(tmp_path / "x.txt", lambda p: (names.append(p.name), text(p)))
    assert len(set(names)) == 8 and all(len(n) >= len(".x.") + 8 + len(".tmp.txt") for n in names)
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    assert not os.path.isdir("/proc/self/fd") or flushed == [False, True] * 8


def test_only_old_leftovers_of_ours_are_removed(tmp_path):
    for name in (".last.abc12345.tmp.pt", ".fresh.abc12345.tmp.pt", "last.pt", ".gitignore"):
        (tmp_path / name).write_text("x")
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / ".link.abc12345.tmp.pt").symlink_to(tmp_path / "theirs")
    for name in (".last.abc12345.tmp.pt", "last.pt", ".gitignore", "theirs"):
        os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    protect(tmp_path)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".fresh.abc12345.tmp.pt", ".gitignore", ".link.abc12345.tmp.pt", "last.pt", "theirs"]


@pytest.mark.parametrize("goal", ["elsewhere", "not_there"])
def test_sample_writes_into_no_linked_folder(goal, foreign, tmp_path, capsys):
    run, elsewhere = foreign(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run / "sample").symlink_to(tmp_path / goal)
    flags = ["--run", str(run), "--count", "1", "--sampling-steps", "2"]
    if goal == "elsewhere":  # another name is taken
        sample.main(flags)
        assert (run / "sample-2.png").is_file() and len(list((run / "sample-2").iterdir())) == 2
    else:
        stops_with(lambda: sample.main(flags), "sample", capsys)
    assert not list(elsewhere.iterdir()) and not (tmp_path / "not_there").exists()


# ------------------------------------------------------------------------------------------------ pictures


FORMATS = {"EPS": "e.png", "TIFF": "t.png", "PPM": "p.jpg", "PCX": "x.webp", "GIF": "g.png", "BMP": "b.jpeg"}


@pytest.mark.parametrize("kind", FORMATS)
def test_only_png_jpeg_and_webp_are_read_whatever_a_file_is_called(kind, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: started.append(a))
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(a))
    path = tmp_path / FORMATS[kind]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path, kind)
    for read in (
        lambda: pictures.read_image(path, 32),
        lambda: pictures.read_mask(path, (32, 32), 32),
        lambda: pictures.picture_size(path),
        lambda: pictures.read_folder(tmp_path, 32),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{path}: not a readable picture, PNG, JPEG or WebP")):
            read()
    assert not started


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_are_read_by_content(kind, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "x.png", kind)
    assert pictures.picture_size(tmp_path / "x.png") == (30, 40)
    assert pictures.read_image(tmp_path / "x.png", None).shape == (3, 30, 40)


def test_a_picture_has_a_largest_size(tmp_path, monkeypatch):
    Image.new("L", (40, 30), 255).save(tmp_path / "x.png")
    assert pictures.MOST_PIXELS == 178_956_970
    monkeypatch.setattr(pictures, "MOST_PIXELS", 1199)
    for read in (
        lambda p: pictures.read_image(p, 8),
        lambda p: pictures.read_mask(p, (30, 40), 8),
        pictures.picture_size,
    ):
        with pytest.raises(ValueError, match="x.png: .*40×30 pixels, more than 1,199"):
            read(tmp_path / "x.png")
    monkeypatch.setattr(pictures, "MOST_PIXELS", 1200)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow only warns of up to twice as many
    assert pictures.read_image(tmp_path / "x.png", 8).shape == (3, 8, 8)


def test_there_is_one_opener_of_picture_files():
    files = [*(ROOT / "minipref").rglob("*.py"), *ROOT.glob("train_*.py"), *ROOT.glob("tutorials/*.py")]
    assert [p.name for p in files if "Image.open" in p.read_text(encoding="utf-8")] == ["pictures.py"]


# ------------------------------------------------------------------------------------------------ texts


SCORES = {"structure": 5, "texture": 6, "overall": 5}


@pytest.mark.parametrize("key", ["image", "masked", "mask"])
@pytest.mark.parametrize(
    "name", ["../out.png", "a/../../out.png", "/etc/hostname", "..\\out.png", "C:\\out.png", "\\\\server\\x", "a\0.png"]
)
def test_ratings_name_files_below_their_folder_only(key, name, tmp_path):
    folder = tmp_path / "rated"
    folder.mkdir()
    for path in (tmp_path / "out.png", folder / "x.png"):
        Image.new("RGB", (32, 32), "red").save(path)
    row = {"image": "x.png", "masked": "x.png", "prompt_id": "a", "scores": SCORES} | {key: name}
    (folder / "ratings.jsonl").write_text(json.dumps(row))
    rows, problems = rating_files.scan(folder)
    assert not rows and len(problems) == 1 and "does not lie in the folder of the ratings" in problems[0]


@pytest.mark.parametrize("key", ["../../out_0", "a/../../../out_1", "x\\..\\..\\..\\out_0"])
def test_the_keys_of_prefpaints_layout_name_files_below_their_folder_only(key, tmp_path):
    (tmp_path / "rated" / "inpaint").mkdir(parents=True)
    (tmp_path / "rated" / "ratings.json").write_text(json.dumps({key: [3, 1]}))
    rows, problems = rating_files.scan(tmp_path / "rated")
    assert not rows and "does not lie in the folder of the ratings" in problems[0]


@pytest.mark.parametrize("prompt", ["a {0.__class__} {1}", "a {:>3000000000}", "a {0} {1} {0} {1}", "a {0!r}", "a dog"])
def test_a_list_of_prompts_is_no_format_string(prompt, tmp_path):
    path = tmp_path / "prompts_and_classes.txt"
    path.write_text(f"Object Prompts\n'{prompt}'.format(unique_token, class_token)\n")
    with pytest.raises(ValueError, match="prompts_and_classes.txt: "):
        subjects.dreambench_prompts(path, False)
    path.write_text("Object Prompts\n'a {0} {1} in the snow'.format(unique_token, class_token)\n")
    assert subjects.dreambench_prompts(path, False) == ["a {} in the snow"]


NAMES = ["x\nnothing is wrong\n.png", "x\x1b[2J\x1b[Hnothing is wrong.png", "x\rnothing is wrong.png", "x\u2028y.png"]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_file_cannot_speak_for_the_program(name, tmp_path, capsys):
    (tmp_path / name).write_text("no picture")
    stops_with(lambda: sample.main(["--image", str(tmp_path / name), "--out", str(tmp_path / "o.png")]), "x", capsys)
    for i in (1, 2):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8)).save(tmp_path / f"{i}.png")
    with pytest.raises(SystemExit):
        check_data.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert "1 problems" in said and "nothing is wrong" not in said.splitlines()
    assert all(line.isprintable() for line in said.splitlines()) and len(said.splitlines()) == 5
    assert printable(name).isprintable() and printable("zwölf × 3.png") == "zwölf × 3.png"


def test_a_prompt_id_cannot_either(tmp_path, capsys):
    (tmp_path / "ratings.jsonl").write_text(json.dumps({"image": "\x1b[2J\nnothing is wrong", "masked": "m"}))
    stops_with(lambda: check_data.main([str(tmp_path)]), "ratings.jsonl", capsys)


def test_a_folder_that_is_no_run_keeps_its_files(tmp_path, capsys):
    """Also those that look like ours; and in a run, those that do not."""
    for name in (".draft.tmp", ".notes.tmp.txt", ".weights.abcdefgh.tmp.pt"):
        (tmp_path / name).write_text("mine")
        os.utime(tmp_path / name, (0, 0))
    stops_with(lambda: evaluate.main(["--run", str(tmp_path)]), "no run lies there", capsys)
    assert len(list(tmp_path.iterdir())) == 3
    checkpoint.protect(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".draft.tmp", ".notes.tmp.txt"]


def test_a_small_checkpoint_cannot_fill_the_memory(tmp_path):
    """Entries that are compressed, tensors that are expanded from a few numbers, and other kinds of tensors."""
    state = {"w": torch.zeros(4)}
    checkpoint.save(tmp_path / "a.pt", "clip", {}, state)
    with zipfile.ZipFile(tmp_path / "a.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more", b"0" * 1_000_000)
    with pytest.raises(ValueError, match="a.pt: cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "a.pt", "clip")
    wide = torch.zeros(1, dtype=torch.float16).expand(1_000_000_000)
    for odd in (wide, torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.zeros(3, device="meta")):
        content = {"kind": "clip", "config": {}, "meta": {}, "state": {"w": odd}}
        torch.save(content, tmp_path / "b.pt")
        with pytest.raises(ValueError, match="b.pt: (not a minipref checkpoint|cannot be read)"):
            checkpoint.load(tmp_path / "b.pt", "clip")
    torch.save({"kind": "clip", "config": {}, "meta": {}, "state": {3: torch.zeros(1)}}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="c.pt: not a minipref checkpoint"):
        checkpoint.load(tmp_path / "c.pt", "clip")


def test_weights_hold_tensors_only(tmp_path):
    class Evil:
        def __reduce__(self):
            return (shutil.rmtree, (str(tmp_path / "precious"),))

    (tmp_path / "precious").mkdir()
    torch.save({"kind": "unet", "config": {}, "state": Evil()}, tmp_path / "unet.pt")
    with pytest.raises(ValueError, match="unet.pt: cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "unet.pt", "unet")
    assert (tmp_path / "precious").is_dir()
