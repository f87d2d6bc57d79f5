"""Shared by all tests: one thread (a busy second core makes two slower than one), and a fixed seed for each test."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
