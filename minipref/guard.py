"""The over-optimisation guard: it notices that a reward is being exploited, without ever seeing the true preference.

A reward model knows its training data. Where a policy leaves them, ‖z‖_V⁻¹ grows, and from there on a rising reward
says little (PrefPaint Section 4). Two signs, read on a fixed set of prompts, stop a run:

- the reward has risen, but the trusted share has collapsed: the share of completions whose norm lies under the 99th
  percentile of the training norms;
- what the reward is worth at least, reward − C_bound·‖z‖_V⁻¹, has for `PATIENCE` looks not risen by a further `MARGIN`
  of its gain: the policy moves on, and nothing that is certain is won.

The weights that count are those of the largest such lower bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PATIENCE = 3  # looks
MARGIN = 0.1  # of what the lower bound had gained over the base model's


@dataclass
class Guard:
    """`floor`: the part of the base model's trusted share under which a reward is no longer believed; 0: never stop."""

    floor: float
    first_reward: float = math.nan
    first_trusted: float = math.nan
    first_lower: float = math.nan
    best: float = -math.inf  # lower bound of any believed weights
    mark: float = -math.inf  # the last lower bound that was a clear gain
    looks: int = 0  # since then

    def start(self, reward: float, trusted: float | None, bound: float | None = None) -> tuple[bool, bool]:
        """(keep, stop) of the base model: the best so far, by definition."""
        self.first_reward = reward
        self.first_lower = self.best = self.mark = reward - (bound or 0)
        self.first_trusted = math.nan if trusted is None else trusted
        return True, False

    def look(self, reward: float, trusted: float | None, bound: float | None = None) -> tuple[bool, bool]:
        """(keep, stop): whether these weights are the best believed so far, and whether to stop here.

        `bound` is the mean error bound of these rewards. A reward without norms never stops.
        """
        believed = trusted is None or not trusted < self.floor * self.first_trusted
        lower = reward - (bound or 0)
        keep = believed and lower > self.best
        if keep:
            self.best = lower
        self.looks += 1
        if believed and lower > self.mark + MARGIN * (self.mark - self.first_lower):
            self.mark, self.looks = lower, 0
        worn_out = bound is not None and self.floor > 0 and self.looks >= PATIENCE
        return keep, (worn_out or not believed) and reward > self.first_reward
