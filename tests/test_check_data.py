"""`python -m minipref check-data`: what a folder holds, and what is wrong where."""

import pytest
import torch
from PIL import Image

from minipref.commands import check_data
from minipref.data.pictures import walk
from minipref.runtime.config import run_main
from minipref.toy.raters import rate_completions
from minipref.toy.world import prompt_source


@pytest.fixture
def run(tmp_path):
    """A run's folder of ratings: 24 toy prompts with two completions each, of noise, and two that are widened."""
    prompts = prompt_source("rating", 0, 32)(0, 24)
    images = prompts.repeat_each(2).paste_known(torch.rand(48, 3, 32, 32))
    rate_completions(tmp_path / "run" / "ratings", prompts, images, seed=0, start=0)
    return tmp_path / "run"


def stopped(call, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main("minipref", call)
    return stop.value.code, capsys.readouterr()


def test_check_data_counts_and_names_what_is_wrong(run, tmp_path, capsys):
    check_data.main([str(run)])
    out = capsys.readouterr().out
    assert "96 rated pictures of 24 prompts, 4 to 4 a prompt" in out and "nothing is wrong" in out
    assert "several raters" in out and "sources: toy 96" in out
    path = tmp_path / "ratings.jsonl"
    lines = (run / "ratings" / "ratings.jsonl").read_text().splitlines()
    for part in ("images", "masked", "masks"):
        (tmp_path / part).symlink_to(run / "ratings" / part)
    path.write_text("\n".join([lines[0].replace('"structure": ', '"structure": 9'), *lines[1:40]]))
    code, said = stopped(lambda: check_data.main(["--path", str(path)]), capsys)
    assert code == 1 and "1 problems" in said.out and f"{path}:1: the score of structure is 9" in said.out
    path.write_text("\n".join([*lines[:40], lines[40].replace('"scene": [3000009, 20]', '"scene": [3000009, 21]')]))
    code, said = stopped(lambda: check_data.main([str(path)]), capsys)
    assert code == 1 and f"{path}:41: scene [3000009, 21] is not what its masked picture shows" in said.out
    code, said = stopped(lambda: check_data.main([]), capsys)
    assert code == 2 and "name a folder" in said.err


def test_check_data_knows_folders_of_pictures(tmp_path, capsys):
    for i, colour in enumerate(("red", "red", "blue")):
        image = Image.new("RGB", (40, 30), colour)
        image.paste("white", (0, 0, 20 if i < 2 else 0, 30))
        image.save(tmp_path / f"{i}.png")
    (tmp_path / "bad.jpg").write_text("no picture")
    code, said = stopped(lambda: check_data.main([str(tmp_path)]), capsys)
    assert code == 1 and "3 readable" in said.out and "1 pictures are copies of others" in said.out
    assert "bad.jpg: not a readable picture" in said.out and "2.png: a single flat colour" in said.out


def test_pictures_come_in_the_order_of_their_paths(tmp_path):
    """Which of them are held out depends on it: folders stand among the files, whatever the system lists first."""
    for name in ("z.png", "b/y.png", "a0.png", "a/2.png", "a/10.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [p.relative_to(tmp_path).as_posix() for p in walk(tmp_path)]
    assert found == ["a/10.png", "a/2.png", "a0.png", "b/y.png", "z.png"]
