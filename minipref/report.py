"""The pictures of a run: before/after grids and curves. Each shows fixed prompts, first sample, never chosen."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .data.prompts import Prompts
from .runtime.draw import Panel, Series, curves, grid, save
from .runtime.runlog import RunFolder

SHOWN = 8  # the first prompts of a batch


def rl_grid(path: Path, prompts: Prompts, before: Tensor, after: Tensor, epoch: int | None) -> None:
    """Prompt, base model and aligned model for the first eight held-out prompts, under the same noise."""
    rows = [
        ("prompt (grey = hole)", prompts.masked[:SHOWN]),
        ("before", before[:SHOWN]),
        ("aligned" if epoch is None else f"after {epoch} epochs", after[:SHOWN]),
    ]
    if prompts.scenes:
        rows.append(("true scene", prompts.images[:SHOWN]))
    save(grid(rows, cell=96), path)


def gold_sheet(path: Path, images: Tensor, gold: Tensor, rows: int = 8, columns: int = 12) -> None:
    """Pictures (N, 3, H, W) by gold rating (N,), evenly over the ranks, the best on top: to judge the rater by."""
    order = gold.argsort(descending=True)
    chosen = order[torch.linspace(0, len(order) - 1, rows * columns).round().long()].view(rows, columns)
    save(grid([(f"gold {gold[r].max():.1f} to {gold[r].min():.1f}", images[r]) for r in chosen], cell=96), path)


def _band(run: RunFolder, name: str, label: str) -> list[Series]:
    """A quantity's median with its 10–90 % band."""
    x, mid = run.column(f"{name}_q50")
    return [Series(label, x, mid, band=(run.column(f"{name}_q10")[1], run.column(f"{name}_q90")[1]))] if x else []


def rl_curves(run: RunFolder) -> None:
    """curves.png of an RL run."""

    def line(key: str, label: str) -> Series:
        return Series(label, *run.column(key))

    panels = [
        Panel("Reward", "epoch", "reward", [line("eval_reward", "held out"), line("reward", "training")]),
        Panel("True preference, held out", "epoch", "gold rating, 1 to 7", [line("eval_gold", "gold")]),
        Panel("Distance to the base model", "epoch", "KL, nats", [line("kl", "KL")]),
        Panel(
            "Joint log-ratio of an update",
            "epoch",
            "nats",
            [line("log_ratio_max", "max"), line("log_ratio_min", "min")],
        ),
        Panel(
            "Within a prompt",
            "epoch",
            "spread",
            [line("within_prompt_std", "reward, std"), line("diversity", "pixels, mean abs. difference")],
        ),
        Panel("Trust weight, 10-50-90 %", "epoch", "gamma", _band(run, "gamma", "training")),
    ]
    kept = [p for p in panels if any(s.x for s in p.series)]
    if kept:
        curves(kept, run.path / "curves.png")
