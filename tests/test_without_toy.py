"""A fork begins by deleting the toy world: the papers must stand without it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minipref.runtime.draw import save, to_image

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_without_toy_and_commands_rl_runs_on_pictures(tmp_path):
    shutil.copytree(
        ROOT / "minipref", tmp_path / "minipref", ignore=shutil.ignore_patterns("toy", "commands", "weights")
    )
    lines = (ROOT / "train_rl.py").read_text(encoding="utf-8").splitlines()
    # The lines that use the toy world, or say in a comment at their end that they are its.
    toys = [line for line in lines if re.search(r"\btoy_\w+|\S.*  # .*\btoy", line) and not line.startswith("SMALL")]
    assert 0 < len(toys) <= 25
    (tmp_path / "train_rl.py").write_text("\n".join(x for x in lines if x not in toys) + "\n", encoding="utf-8")
    for i in range(10):
        picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i))
        save(to_image(picture), tmp_path / "pictures" / f"{i}.png")
    flags = "--small --epochs 1 --prompts 2 --samples 2 --sampling-steps 2 --train-steps 1 --eval-prompts 8"
    flags += f" --win-prompts 8 --threads 1 --reward jpeg_size --data pictures --weights {ROOT}/minipref/weights/small"
    command = [sys.executable, "train_rl.py", *flags.split(), "--out", "run"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").is_file() and (tmp_path / "run" / "last.pt").is_file()
