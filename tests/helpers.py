"""What several test files share."""

import json
import re
import sys

import pytest
import torch

import train_rl
import train_rpo
from minipref import reward_model
from minipref.diffusion import Condition, Schedule, ScheduleConfig
from minipref.kernels.ddim_step_logprob import step_gaussian
from minipref.models.reward_features import FeatureConfig, RewardFeatures
from minipref.pipeline import load_unet
from minipref.runtime.config import run_main

KINDS = ["linear", "scaled_linear", "squaredcos_cap_v2"]  # of noise schedules
NORMS = {"": (4.0, 1.5), "toy/square": (4.0, 2.0), "toy/strip": (3.0, 1.0)}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learned(seed=0, **changes):
    """A reward model of random features, with trust weight exp(-1.5 norm + 0.3)."""
    torch.manual_seed(seed)
    features = RewardFeatures(FeatureConfig(pixel_width=4, widths=(4, 6), dim=5))
    ridge = reward_model.ridge_fit(gaussian(40, 5), gaussian(40, seed=1), 0.5)
    values = {"k": 1.5, "b": 0.3, "norm_quantiles": {"0.5": 0.2, "0.99": 0.9}, "label_norms": NORMS}
    values |= {"noise_scale": 0.2, "psi_norm": 1.5} | changes
    return reward_model.LearnedReward(features, ridge, reward_model.Calibration(**values))


def schedule(**changes):
    return Schedule(ScheduleConfig(**{"beta_schedule": "squaredcos_cap_v2", "set_alpha_to_one": True, **changes}))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def step_mean(s, output, x_t, t, t_prev, eta):
    """Mean like x_t and sigma (B, 1, 1, 1) of the step t → t_prev: the schedule's coefficients, the step's Gaussian."""
    times = (torch.as_tensor(v).expand(len(x_t)) for v in (t, t_prev))
    return step_gaussian(output, x_t, *s.coefficients(*times, eta))


def condition(batch, width=3, context=None, empty=None):
    text = torch.zeros(batch, 2, width) if context is None else context
    return Condition(text, empty=empty)


# A run of train_rl.py that takes seconds.
TINY = {
    "--epochs": 2, "--prompts": 3, "--samples": 2, "--sampling-steps": 3, "--train-steps": 2, "--eval-every": 1,
    "--eval-prompts": 8, "--win-prompts": 8,
}  # fmt: skip


def train_tiny(out, monkeypatch, **changes):
    """Runs train_rl.py in this process; -> its summary."""
    flags = {**TINY, **{"--" + k.replace("_", "-"): v for k, v in changes.items()}}
    argv = ["train_rl.py", "--small", "--out", str(out)] + [str(x) for pair in flags.items() for x in pair if x != ""]
    monkeypatch.setattr(sys, "argv", argv)
    train_rl.main()
    return json.loads((out / "summary.json").read_text())


def stops_with(call, message, capsys):
    """Exit code 2 and one line that holds `message`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main("minipref", call)
    text = capsys.readouterr().err
    lines = [x for x in text.splitlines() if not re.match(r"[\w ]+: +\d+%\|", x)]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0], text


# A run of train_rpo.py that takes seconds.
TINY_RPO = {
    "--updates": 4, "--val-every": 2, "--train-prompts": 2, "--images": 2, "--val-prompts": 2, "--val-images": 2,
    "--test-prompts": 3, "--test-images": 2, "--sampling-steps": 2, "--batch-size": 2, "--lr": 1e-3, "--beta": 0.02,
    "--eta": 0, "--guidance": 3,
}  # fmt: skip


def train_rpo_tiny(out, *more, **changes):
    """Runs train_rpo.py in this process; -> its summary."""
    flags = {**TINY_RPO, **{"--" + k.replace("_", "-"): v for k, v in changes.items()}}
    if {"similarity", "dreambooth"} & {*more, changes.get("mode")} and "beta" not in changes:
        del flags["--beta"]  # belongs to pairs
    argv = ["train_rpo.py", "--small", "--out", str(out), *more] + [str(x) for pair in flags.items() for x in pair]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        train_rpo.main()
    return json.loads((out / "summary.json").read_text())


def rpo_weights(folder, name="last"):
    return load_unet(folder / f"{name}.pt")[0].state_dict()


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)
