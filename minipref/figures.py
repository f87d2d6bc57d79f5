"""The pictures of a run: before/after grids and curves. Each shows fixed prompts, first sample, never chosen."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .data.prompts import Prompts
from .runtime.draw import Panel, Series, curves, grid, save, stack
from .runtime.runlog import RunFolder

SHOWN = 8  # the first prompts of a batch


def rl_grid(path: Path, prompts: Prompts, before: Tensor, after: Tensor, epoch: int | None) -> None:
    """Prompt, base model and aligned model for the first eight held-out prompts."""
    rows = [
        ("prompt (grey = hole)", prompts.masked[:SHOWN]),
        ("before", before[:SHOWN]),
        ("aligned" if epoch is None else f"after {epoch} epochs", after[:SHOWN]),
    ]
    if prompts.truth:
        rows.append(("true scene", prompts.images[:SHOWN]))
    save(grid(rows, cell=96), path)


def gold_sheet(path: Path, images: Tensor, gold: Tensor, rows: int = 8, columns: int = 12) -> None:
    """Pictures (N, 3, H, W) by gold rating (N,), evenly over the ranks, the best on top: to judge the rater by."""
    order = gold.argsort(descending=True)
    chosen = order[torch.linspace(0, len(order) - 1, rows * columns).round().long()].view(rows, columns)
    save(grid([(f"gold {gold[r].max():.1f} to {gold[r].min():.1f}", images[r]) for r in chosen], cell=96), path)


def reward_pictures(folder: Path, model, rated, judged, kind: str, delta: float, gammas: dict[str, Tensor]) -> None:
    """bound.png (errors under their bound, coverage, trust weights) and trust.png of a reward model.

    model: LearnedReward; rated (N,) and judged, on prompts that it has never seen, against `kind` (gold or ratings);
    gammas: trust weights by policy.
    """
    norm, error = judged.norm.double(), (judged.guess - judged.truth).abs()
    ends = torch.tensor([float(norm.min()), float(norm.max())], dtype=torch.float64)
    names = {kind: error, "one rater": (judged.guess - judged.single).abs()}
    deltas = [0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01]
    coverage = [
        Series(k, [1 - d for d in deltas], [float((e <= model.bound_factor(d) * norm).double().mean()) for d in deltas])
        for k, e in names.items()
    ]
    share = [(i + 0.5) / 100 for i in range(100)]
    panels = [
        Panel(
            "Errors and their bound",
            "norm of z in V^-1",
            f"|error| against {kind}, normalised",
            [
                Series("one completion", norm, error.clamp(min=1e-4), points=True),
                Series(f"bound, 1 - delta = {1 - delta:g}", ends, model.bound_factor(delta) * ends),
            ],
            y_log=True,
        ),
        Panel(
            "How often the bound holds",
            "1 - delta",
            "share of errors under the bound",
            coverage + [Series("1 - delta", [0.5, 0.99], [0.5, 0.99])],
        ),
    ]
    if gammas:
        lines = [Series(k, [float(g.double().quantile(q)) for q in share], share) for k, g in gammas.items()]
        panels.append(Panel("Trust weight by policy", "gamma", "share of completions below", lines))
    curves(panels, folder / "bound.png")
    order = judged.norm.argsort()
    rows = []
    for name, at in (("most trusted", order[:SHOWN]), ("least trusted", order.flip(0)[:SHOWN])):
        rows.append((f"{name}: prompt", rated.prompts.masked[at]))
        lo, hi = float(judged.gamma[at].min()), float(judged.gamma[at].max())
        rows.append((f"completion, gamma {lo:.2g} to {hi:.2g}", rated.images[at]))
    save(grid(rows, cell=96), folder / "trust.png")


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
        Panel("Trusted completions", "epoch", "share under the 99 % norm", [line("eval_trusted", "held out")]),
    ]
    drawn = [p for p in panels if any(s.x for s in p.series)]
    if drawn:
        curves(drawn, run.path / "curves.png")


def rpo_grid(path: Path, subject, prompts: list, pictures: dict[str, Tensor], count: int = 8) -> None:
    """The references; below them the rows of `shown`, (P, 3, H, W) each, one picture for each of P prompts `asked`.

    The first `count` prompts are shown, never chosen.
    """
    references = grid([("references", subject.references[:count])], cell=96, title=subject.name)
    rows = [(k, v[:count]) for k, v in pictures.items()]
    save(stack([references, grid(rows, cell=96, columns=[p.text for p in prompts[:count]])]), path)


def rpo_curves(run: RunFolder, lam: float, mean: str, best: int) -> None:
    """curves.png of an RPO run; the best step is marked on every validated curve."""

    def line(key: str, label: str) -> Series:
        return Series(label, *run.column(key, "step"))

    def validated(title: str, unit: str, names: dict[str, str]) -> Panel:
        columns = {label: run.column(key, "step") for key, label in names.items()}
        drawn = [Series(label, x, y) for label, (x, y) in columns.items() if x]
        points = [y[x.index(best)] for x, y in columns.values() if best in x]
        return Panel(title, "step", unit, [*drawn, Series("best step", [best] * len(points), points, points=True)])

    measures = {f"val_{k}": k for k in ("subject", "background", "second", "all")}
    losses = [line(k, k) for k in ("similarity", "prior")]
    panels = [
        validated(f"Validation reward, {mean}, lambda {lam:g}", "reward", {f"val_{lam}": "reward"}),
        validated("Likeness", "I and T, 0 to 1", {"val_i": "subject, I", "val_t": "prompt, T"}),
        validated("True measures", "share of pictures", measures),
        Panel("Losses", "step", "mean squared error", [s for s in losses if s.x]),
        Panel("Preference loss, log 2 at first", "step", "nats", [line("preference", "preference")]),
        Panel("Preference margin", "step", "l, mean squared error", [line("margin", "margin")]),
    ]
    curves([p for p in panels if any(s.x for s in p.series)], run.path / "curves.png")
