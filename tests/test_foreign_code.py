"""Code of the user's, a reward, its module, an image encoder, changes nothing for the process that calls it."""

import os
import random
import signal
import sys
import warnings

import numpy as np
import pytest
import torch

from minipref.rewards import CheckedReward, ImageJudge, load_reward
from minipref.runtime.foreign import foreign_code
from minipref.toy.world import scene_prompts

# What code may do, each of which would last: as source, so that it serves in a reward and in a module.
MEDDLING = {
    "gradients off": "torch.set_grad_enabled(False)",
    "gradients off, entered": "torch.no_grad().__enter__()",
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "default device": "torch.set_default_device('meta')",
    "torch's seed": "torch.manual_seed(7)",
    "numpy's seed": "np.random.seed(7)",
    "python's seed": "random.seed(7)",
    "draws": "torch.rand(5), np.random.rand(5), random.random()",
    "threads": "torch.set_num_threads(3)",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "deterministic, with warnings": "torch.use_deterministic_algorithms(True, warn_only=True)",
    "matmul precision": "torch.set_float32_matmul_precision('medium')",
    "anomaly detection": "torch.autograd.set_detect_anomaly(True)",
    "numpy's errors": "np.seterr(all='raise')",
    "folder": "os.chdir('/')",
    "folder, deleted": "os.mkdir('away'); os.chdir('away'); os.rmdir('../away')",
    "warnings ignored": "warnings.filterwarnings('ignore')",
    "warnings as errors": "warnings.simplefilter('error')",
    "warnings reset": "warnings.resetwarnings()",
    "output": "sys.stdout = sys.stderr = None",
    "autocast": "torch.set_autocast_enabled('cpu', True)",
    "umask": "os.umask(0o777)",
    "environment": "os.environ['OMP_NUM_THREADS'] = '7'; os.environ.pop('PATH')",
    "Ctrl-C": "signal.signal(signal.SIGINT, signal.SIG_IGN)",
    "SIGTERM": "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "everything": "torch.set_default_dtype(torch.float64); torch.set_num_threads(2); os.chdir('/'); np.random.seed(1)",
}
MODULES = {"np": np, "os": os, "random": random, "signal": signal, "sys": sys, "torch": torch, "warnings": warnings}


def state():
    """All of it, read here: by what it does where that can be seen."""
    draws = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    kinds = torch.empty(0).dtype, torch.empty(0).device, (torch.ones(1, requires_grad=True) * 1).requires_grad
    numbers = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_anomaly_enabled(), np.geterr()
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.umask(mask := os.umask(0o022))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    process = mask, environment, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    numbers += (torch.is_autocast_enabled("cpu"), process)
    return draws, kinds, numbers, algorithms, os.getcwd(), list(warnings.filters), (sys.stdout, sys.stderr)


@pytest.fixture
def unchanged(tmp_path, monkeypatch):
    """Compares before with after, and mends what a fault would leave to other tests."""
    monkeypatch.chdir(tmp_path)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    threads, errors = torch.get_num_threads(), np.geterr()
    with warnings.catch_warnings():
        before = state()
        yield tmp_path
        try:
            assert state() == before
        finally:
            torch.set_grad_enabled(True)
            torch.set_autocast_enabled("cpu", False)
            os.umask(before[2][-1][0])
            os.environ.update(before[2][-1][1])
            signal.signal(signal.SIGINT, before[2][-1][2]), signal.signal(signal.SIGTERM, before[2][-1][3])
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(False)
            torch.set_float32_matmul_precision("highest")
            torch.autograd.set_detect_anomaly(False)
            np.seterr(**errors)


@pytest.mark.parametrize("line", MEDDLING.values(), ids=MEDDLING)
@pytest.mark.parametrize("fails", [False, True])
def test_a_reward_changes_no_setting_and_no_random_number(line, fails, unchanged):
    def mine(x, p):
        value = x.mean((1, 2, 3))
        exec(line, dict(MODULES))
        if fails:
            raise RuntimeError
        return value

    prompts = scene_prompts(3, 0, 6)
    if fails:
        with pytest.raises(ValueError, match="reward mine: raised RuntimeError"):
            CheckedReward("mine", mine)(prompts.images, prompts)
    else:
        scores = CheckedReward("mine", mine)(prompts.images, prompts)
        assert torch.equal(scores.value, prompts.images.mean((1, 2, 3)))


@pytest.mark.parametrize("line", MEDDLING.values(), ids=MEDDLING)
def test_nor_does_a_module_that_is_imported(line, unchanged, monkeypatch):
    names = ", ".join(MODULES).replace("np", "numpy as np")
    code = f"import {names}\n{line}\ndef f(x, p):\n    return x.mean((1, 2, 3))\n"
    (unchanged / "meddling_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(unchanged))
    load_reward("meddling_module:f", None)
    sys.modules.pop("meddling_module")


def test_nor_does_an_image_encoder(unchanged, monkeypatch):
    code = "import torch\ntorch.set_default_dtype(torch.float64)\ntorch.manual_seed(3)\n"
    code += "def f(x):\n    torch.set_grad_enabled(False)\n    return x.mul_(0).add_(1)[:, :, 0, 0]\n"
    (unchanged / "meddling_encoder.py").write_text(code)
    monkeypatch.syspath_prepend(str(unchanged))
    references = scene_prompts(3, 0, 6).images
    ImageJudge("meddling_encoder:f", references)
    assert torch.equal(references, scene_prompts(3, 0, 6).images)


def test_ctrl_c_leaves_nothing_behind_either(unchanged):
    with pytest.raises(KeyboardInterrupt), foreign_code():
        torch.set_num_threads(2)
        os.chdir("/")
        raise KeyboardInterrupt


def test_what_nobody_has_changed_is_not_set_again(monkeypatch, unchanged):
    """Setting the device or the warnings costs, though it changes nothing."""
    for name in ("set_default_device", "set_num_threads", "use_deterministic_algorithms"):
        monkeypatch.setattr(torch, name, lambda *a, **k: pytest.fail("was set"))
    monkeypatch.setattr(warnings, "resetwarnings", lambda: pytest.fail("was reset"))
    with foreign_code():
        pass
    monkeypatch.undo()
    os.chdir(unchanged)
