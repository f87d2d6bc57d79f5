"""Shared by all tests: one thread (a busy second core makes two slower than one), and a fixed seed for each test."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parent.parent / "tutorials"))  # run.py and claims.py live there,
sys.path.insert(0, str(Path(__file__).parent.parent))  # the training scripts at the top

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in the interpreter; read when triton is imported

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """One tiny run of train_rl.py that several tests look at -> (its folder, its summary)."""
    from helpers import train_tiny

    folder = tmp_path_factory.mktemp("runs") / "a"
    with pytest.MonkeyPatch.context() as patch:
        return folder, train_tiny(folder, patch)
