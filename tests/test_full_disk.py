"""A full disk: one plain line that names the file; what lay there before is whole, and nothing temporary stays.

A limit on the size of files stands for the disk: it cuts off a write in the middle, as a full disk does.
"""

import contextlib
import errno
import json
import shutil
import sys
from types import SimpleNamespace

import claims
import numpy as np
import pytest
import torch
from helpers import TINY, learned, stops_with
from PIL import Image
from test_bad_inputs import listing

import train_rl
from minipref.commands import evaluate, sample
from minipref.data import rating_files
from minipref.runtime import checkpoint, draw
from minipref.runtime.runlog import RunFolder
from minipref.toy.world import scene_prompts

resource = pytest.importorskip("resource", reason="limits of files need a POSIX system")


@contextlib.contextmanager
def full(size):
    """While it lasts no file can grow beyond `size` bytes, and no byte of the disk is free."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8))


def panel(again):
    return draw.Panel("again" if again else "first", "x", "y", [draw.Series("a", [0, 1], [0, 1])])


def run_folder(path):
    """A run that has written a row."""
    run = RunFolder(str(path / "run"), "", {"seed": 0}, "s")
    run.log(epoch=0)
    return run


# What is written a first and a second time (True), by the name of the file.
AGAIN = {
    "last.pt": lambda p, again: checkpoint.save(p / "last.pt", "unet", {}, {"x": torch.full((999,), float(again))}),
    "reward.pt": lambda p, again: learned(seed=again).save(p / "reward.pt", {}),
    "grid.png": lambda p, again: draw.save(noise(again), p / "grid.png"),
    "photo.jpg": lambda p, again: draw.save(noise(again), p / "photo.jpg"),
    "curves.png": lambda p, again: draw.curves([panel(again)], p / "curves.png"),
    "evaluation.md": lambda p, again: checkpoint.write_text(p / "evaluation.md", f"{again}\n" * 99),
    "samples/000001.png": lambda p, again: draw.save(noise(again), p / "samples" / "000001.png"),
}  # fmt: skip


@pytest.mark.parametrize("name", AGAIN)
@pytest.mark.parametrize("size", [0, 100])
def test_a_file_that_cannot_be_replaced_stays_as_it_was(name, size, tmp_path, capsys):
    AGAIN[name](tmp_path, False)
    before = listing(tmp_path)
    with full(size):
        stops_with(lambda: AGAIN[name](tmp_path, True), f"{name}: could not be written (the disk is full)", capsys)
    assert listing(tmp_path) == before
    AGAIN[name](tmp_path, True)
    assert listing(tmp_path) != before  # it would have been another


REASONS = {
    "No space left on device": OSError(errno.ENOSPC, "No space left on device"),
    "File too large": OSError(errno.EFBIG, "File too large"),
    "encoder error -2": OSError("encoder error -2"),
    "written in part": RuntimeError("written in part"),
}


@pytest.mark.parametrize("name", REASONS)
@pytest.mark.parametrize("covered", [False, True])
@pytest.mark.parametrize("free,least", [(0, True), (1 << 20, False)])
def test_the_reason_is_in_plain_words(name, covered, free, least, tmp_path, monkeypatch):
    """By the number of the system's error, which torch covers with one of its own, or by what is free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    def fails(path):
        try:
            raise REASONS[name]
        except Exception:
            if covered:
                raise RuntimeError("enforce fail") from None
            raise

    plain = "enforce fail" if covered and REASONS[name].args == (name,) else name  # no number to find
    with pytest.raises(OSError) as stop:
        checkpoint.atomic_write(tmp_path / "x.pt", fails)
    reason = "the disk is full" if least or name.startswith("No space") else plain
    assert str(stop.value) == f"{tmp_path / 'x.pt'}: could not be written ({reason})"
    assert not list(tmp_path.iterdir())


def test_a_log_keeps_the_rows_that_it_has(tmp_path, capsys):
    """Not half a row either, which no tool could read."""
    run = run_folder(tmp_path)
    before = listing(tmp_path)
    log = run.path / "metrics.jsonl"
    with full(log.stat().st_size + 20):
        stops_with(lambda: run.log(epoch=1, kl=0.1234, reward=0.5678), f"{log}: could not be written (the disk", capsys)
    assert listing(tmp_path) == before
    run.log(epoch=1)
    assert [json.loads(line) for line in log.read_text().splitlines()] == [{"epoch": 0}, {"epoch": 1}]


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_the_json_of_a_run_stays_whole(name, tmp_path, capsys):
    run = run_folder(tmp_path)
    run.write_json(name, {"a": 1})
    before = listing(tmp_path)
    with full(100):
        stops_with(lambda: run.write_json(name, {"a": "b" * 200}), f"{name}: could not be written (the disk", capsys)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("size,name", [(10, "config.json"), (2000, "command.txt")])
def test_a_run_that_cannot_begin_names_its_file(size, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_rl.py", "x" * 3000])
    with full(size):
        stops_with(lambda: run_folder(tmp_path), f"{name}: could not be written (the disk is full)", capsys)
    assert not [p for p in tmp_path.rglob("*") if ".tmp" in p.name or p.name == name]


@pytest.mark.parametrize("size,name", [(100, "images/a_0.png"), (4000, "ratings.jsonl")])
def test_ratings_name_the_picture_or_the_list(size, name, tmp_path, capsys):
    count = 40
    prompts, folder = scene_prompts(0, 0, count), tmp_path / "ratings"
    scores = [{k: torch.ones(count) for k in rating_files.WEIGHTS}]
    ids = ["a", *map(str, range(1, count))]
    kinds = {"widened": torch.zeros(count), "source": "s"}
    with full(size):
        stops_with(
            lambda: rating_files.write(folder, prompts, prompts.images, scores, ids, **kinds),
            f"{folder / name}: could not be written (the disk is full)",
            capsys,
        )
    assert not (folder / name).exists() and not [p for p in tmp_path.rglob("*") if ".tmp" in p.name]


def test_a_run_that_cannot_be_written_to_is_not_evaluated(tmp_path, monkeypatch, capsys):
    """Its report belongs there: that is known before the work."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr(evaluate, "run_report", lambda cfg: pytest.fail("it works"))
    line = f"--run {tmp_path}: evaluation.md could not be put there: {tmp_path} is no folder that can be written to"
    stops_with(lambda: evaluate.main(["--run", str(tmp_path)]), line, capsys)


def test_whole_commands_say_so_too(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    flags = [str(x) for pair in TINY.items() for x in pair]
    monkeypatch.setattr(sys, "argv", ["train_rl.py", "--small", *flags, "--out", str(out)])
    with full(1_000_000):
        stops_with(train_rl.main, f"{out / 'last.pt'}: could not be written (the disk is full)", capsys)
    assert sorted(p.name for p in out.iterdir()) == ["command.txt", "config.json", "metrics.jsonl", "samples"]
    grid = tmp_path / "sample.png"
    with full(100):
        stops_with(
            lambda: sample.main(["--count", "1", "--sampling-steps", "2", "--out", str(grid)]), "sample.png", capsys
        )
    with full(10):
        stops_with(lambda: claims.main(["--out", str(tmp_path / "c")]), "provenance.txt: could not be written", capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "run"] and not list((tmp_path / "c").iterdir())
