"""Ctrl-C and SIGTERM end a program in one line with exit code 130, whenever they come, and all that it has started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import claims
import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}

# A script in place of the training scripts: it says that it runs, and would go on.
CHILD = "import os, pathlib, time\npathlib.Path(f'{os.getpid()}.pid').touch()\ntime.sleep(600)\n"
STUDY = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT / "tutorials")!r})
import claims
claims.ROOT = pathlib.Path()
claims.run_main("claims", claims.main)
"""


def running(pid):
    """Whether a process of this number is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition, seconds=60):
    """Waits for it; the limit is for a fault, not a promise of speed."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.skipif(os.name != "posix", reason="signals between processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_study_that_is_stopped_ends_its_runs(number, tmp_path):
    """Three real children run; three runs that wait are never started."""
    for name in ("train_rl.py", "train_rpo.py"):
        (tmp_path / name).write_text(CHILD)
    command = [sys.executable, "-c", STUDY, "--study", "rl", "--seeds", "2", "--jobs", "3", "--out", "study"]
    with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as study:
        children = []
        try:
            assert until(lambda: len(list(tmp_path.glob("*.pid"))) == 3)
            children = [int(p.stem) for p in tmp_path.glob("*.pid")]
            assert all(map(running, children))
            study.send_signal(number)
            _, errors = study.communicate(timeout=60)
            assert until(lambda: not any(map(running, children)))
        finally:
            study.kill()
            for pid in filter(running, children):
                os.kill(pid, signal.SIGKILL)
    assert study.returncode == 130 and "Traceback" not in errors
    assert "claims: interrupted; every file that was written is whole" in errors.splitlines()
    assert len(list(tmp_path.glob("*.pid"))) == 3


@pytest.mark.skipif(os.name != "posix", reason="signals between processes")
def test_a_child_that_starts_while_the_others_are_ended_is_ended_too(tmp_path, monkeypatch):
    (tmp_path / "train_rl.py").write_text(CHILD)
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    claims._stopping.set()
    with pytest.raises(ValueError, match="exit code -15"):
        claims.run_one(tmp_path / "run", "train_rl.py", [])
    assert not claims._children
    claims._stopping.clear()


COMMANDS = [
    ["train_rl.py", "--small"], ["train_rpo.py", "--small"], ["train_reward.py", "--small"], ["tutorials/claims.py"],
    ["tutorials/run.py", "1"], ["-m", "minipref", "sample"], ["-m", "minipref", "pretrain", "--small"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_ctrl_c_during_the_imports_is_one_line(command, tmp_path):
    """In place of torch stands a module during whose import Ctrl-C is pressed."""
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    first = str(ROOT / command[0]) if command[0].endswith(".py") else command[0]
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, first, *command[1:]], cwd=tmp_path, env=ENVIRONMENT | paths, capture_output=True, text=True
    )
    assert done.returncode == 130 and not done.stdout
    assert done.stderr.count("\n") == 1 and ": interrupted" in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["torch.py"]


def test_other_errors_during_the_imports_keep_their_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not whole')\n")
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, str(ROOT / "train_rl.py")]
    done = subprocess.run(command, env=ENVIRONMENT | paths, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "torch is not whole" in done.stderr
