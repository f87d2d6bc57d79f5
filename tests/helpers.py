"""What several test files share."""

import torch

from minipref import rewards as R
from minipref.diffusion import Condition, Schedule, ScheduleConfig
from minipref.models.reward_features import FeatureConfig, RewardFeatures

KINDS = ["linear", "scaled_linear", "squaredcos_cap_v2"]  # of noise schedules
NORMS = {"": (4.0, 1.5), "toy/square": (4.0, 2.0), "toy/strip": (3.0, 1.0)}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learned(seed=0, **changes):
    """A reward model of random features, with trust weight exp(-1.5 norm + 0.3)."""
    torch.manual_seed(seed)
    features = RewardFeatures(FeatureConfig(pixel_width=4, widths=(4, 6), dim=5))
    ridge = R.ridge_fit(gaussian(40, 5), gaussian(40, seed=1), 0.5)
    known = {"k": 1.5, "b": 0.3, "norm_quantiles": {"0.5": 0.2, "0.99": 0.9}, "label_norms": NORMS}
    return R.LearnedReward(features, ridge, R.Calibration(**(known | {"noise_scale": 0.2, "psi_norm": 1.5} | changes)))


def schedule(**changes):
    return Schedule(ScheduleConfig(**{"beta_schedule": "squaredcos_cap_v2", "set_alpha_to_one": True, **changes}))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def condition(batch, width=3, context=None, empty=None):
    text = torch.zeros(batch, 2, width) if context is None else context
    return Condition(text, empty=empty)
