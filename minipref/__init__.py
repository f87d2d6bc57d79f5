"""Preference alignment of diffusion models, from scratch: PrefPaint and RPO.

A room imports only from rooms to its left (tests/test_house.py reads the imports and says so):

    runtime, kernels <- models <- data <- diffusion, losses, reward_model, rewards, metrics, guard (the papers)
        <- presets <- pipeline <- runs, figures <- commands, train_*.py

`toy`, the toy world, imports data and what lies left of it; only commands, scripts, tutorials and tests import toy.
"""

__version__ = "0.2.0"
