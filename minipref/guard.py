"""The over-optimisation guard: it notices that a reward is being exploited, without ever seeing the true preference.

A reward model knows its training data. When a policy leaves them, ‖z‖_V⁻¹ grows past the training norms, and from there
on a rising reward says little (PrefPaint Section 4). The guard reads two numbers of a fixed set of prompts: the mean
reward, and the share of completions whose norm lies under the 99th percentile of the training norms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Guard:
    """`floor`: the part of the base model's trusted share under which a reward is no longer believed; 0: never."""

    floor: float
    first_reward: float = math.nan
    first_trusted: float = math.nan
    best: float = -math.inf

    def start(self, reward: float, trusted: float | None) -> None:
        """What the base model scores."""
        self.first_reward = self.best = reward
        self.first_trusted = math.nan if trusted is None else trusted

    def look(self, reward: float, trusted: float | None) -> tuple[bool, bool]:
        """(keep, stop): whether these weights are the best believed so far, and whether to stop here.

        Stops where the reward has risen but the trusted share has collapsed. A reward without norms never stops.
        """
        believed = trusted is None or not trusted < self.floor * self.first_trusted
        keep = believed and reward > self.best
        if keep:
            self.best = reward
        return keep, not believed and reward > self.first_reward
