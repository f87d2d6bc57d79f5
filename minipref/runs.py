"""A run reopened: its configuration, base model and trained weights, by whichever version it was written."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .data.pictures import picture_list
from .data.prompts import Prompts, PromptSource, picture_sources
from .models.unet import UNet
from .pipeline import Pipeline, digest, load_unet
from .runtime.checkpoint import protect
from .runtime.config import MOST
from .runtime.runlog import read_json

# Flags, and so keys of config.json, that had another name before 0.2: old name -> new, by script or command.
RENAMED: dict[str, dict[str, str]] = {
    "train_rl.py": {"steps": "sampling_steps", "updates": "updates_per_epoch"},
    "train_rpo.py": {
        "steps": "updates", "sample_steps": "sampling_steps", "prompts": "prompt_file", "batch": "batch_size"
    },
    "train_reward.py": {
        "steps": "sampling_steps", "batch": "batch_size",
        "resume_with": "second_round", "second_prompts": "second_round_prompts",
    },
    "pretrain": dict.fromkeys(("reward_prompts", "reward_dim"), "gone: train_reward.py makes the reward model"),
    "sample": {"steps": "sampling_steps"},
    "evaluate": {"steps": "sampling_steps"},
    "bench": {"steps": "sampling_steps", "batch": "batch_size"},
}  # fmt: skip
# Without a script's name, an old configuration is known by a key that only that script has.
MARKS = {"train_rpo.py": "lam_val", "train_reward.py": "psi_norm", "train_rl.py": "clip_range"}
# What the configuration of a run must hold for the tools that read it: a text, or a number of this type and range.
TEXT, SEED, STEPS, SHARE = None, (int, 0, 999_999), (int, 2, 1000), ((int, float), 0, 1)
KEYS: dict[str, dict[str, Any]] = {
    "train_rl.py": {
        "weights": TEXT, "data": TEXT, "reward": TEXT, "seed": SEED, "held_out": SEED, "eval_prompts": (int, 8, MOST),
        "sampling_steps": STEPS, "eta": SHARE,
    },
    "train_rpo.py": {
        "weights": TEXT, "references": TEXT, "lam_val": SHARE, "sampling_steps": STEPS,
        "guidance": ((int, float), 0, MOST), "eta": SHARE,
    },
}  # fmt: skip


def _within(value: Any, limits: tuple | None) -> bool:
    if limits is None:
        return isinstance(value, str)
    kind, low, high = limits
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def absolute(path: str) -> str:
    """A folder as config.json names it: a run is read from other folders than it was started in."""
    return os.path.abspath(path) if path else ""


def read_config(folder: str | Path) -> dict:
    """The configuration of a finished or interrupted run under today's names, its script as "script"."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no run lies there (config.json is missing)")
    config = read_json(path)
    if "script" in config:
        if not isinstance(config["script"], str):
            raise ValueError(f"{path}: script is {str(config['script'])[:60]!r}, expected the name of one")
        return config
    script = next((name for name, key in MARKS.items() if key in config), "")
    renamed = RENAMED.get(script, {})
    return {renamed.get(k, k): v for k, v in config.items()} | {"script": script}


def judged_by(folder: str | Path) -> str:
    """Which weights a run speaks of: "best" of RPO and where RL's guard has stopped it, by its log; else "last". Of a
    run that was stopped by hand while it wrote them, those that are there."""
    log = Path(folder) / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().split("\n") if log.is_file() else []
    stopped = bool(lines) and '"stopped": true' in lines[-1]
    names = ["last", "best"]
    if stopped or read_config(folder)["script"] == "train_rpo.py":
        names.reverse()
    return next((name for name in names if (Path(folder) / f"{name}.pt").is_file()), names[0])


def load_run(
    folder: str,
    which: str,
    device: str,
    script: str = "train_rl.py",
    *,
    weights: str | None = None,
    data: str = "",
    inside: tuple = (),
) -> tuple[dict, Pipeline, UNet]:
    """-> a run's configuration, the base model's pipeline, and the trained UNet: last, best, or (which "") the one that
    its summary was judged by.

    `weights`, `data`: where its base model and its pictures lie now, where it was moved to another machine (None: no
    flag of the command says so); `inside`: runs that start from this one, so that none starts from itself.
    """
    config = read_config(folder)
    protect(folder)
    file, path = Path(folder) / "config.json", Path(folder) / f"{which or judged_by(folder)}.pt"
    if missing := set(KEYS[script]) - set(config):
        raise ValueError(f"{file}: no run of {script}, it lacks {', '.join(sorted(missing))}")
    for key, limits in KEYS[script].items():
        if not _within(config[key], limits):
            raise ValueError(f"{file}: {key} is {str(config[key])[:60]!r}, which no run of {script} writes")
    if data and not config.get("data"):
        raise ValueError(f"--data {data}: {folder} had no pictures")
    config["data"] = data or config.get("data", "")
    base = weights or config["weights"]
    if base and not weights and not Path(base).is_dir():
        how = 'by "weights"' if weights is None else "by --weights, or"
        raise FileNotFoundError(f"{base}: the base model of {folder} is not there; say where {how} in {file}")
    if not path.is_file():
        there = [name for name in ("last.pt", "best.pt") if (Path(folder) / name).is_file()]
        why = f"{there[0]} lies there" if there else "the run was stopped before its first evaluation"
        raise FileNotFoundError(f"{path}: no such checkpoint; {why}")
    pipe = load_pipeline(base, device, inside=(*inside, os.path.realpath(folder)))
    aligned, _, meta = load_unet(path)
    if meta.get("base") != pipe.fingerprint:
        raise ValueError(f"{path}: was trained from another base model than {base or 'the shipped one'}")
    if aligned.config != pipe.unet.config:
        raise ValueError(f"{path}: its UNet is configured differently from the base model's ({pipe.unet.config})")
    return config, pipe, aligned.to(memory_format=torch.channels_last).to(pipe.device)  # type: ignore[call-overload]


def load_pipeline(weights: str, device: str, *, steps: int = 1, inside: tuple = ()) -> Pipeline:
    """The model of a folder of weights, or of a run: its trained UNet with the rest of its base model. Refuses more
    sampling `steps` than its noise schedule has."""
    if not weights or (Path(weights) / "unet.pt").exists() or not (Path(weights) / "config.json").is_file():
        pipe = Pipeline.load(weights, device)
        pipe.schedule.timesteps(steps)
        return pipe
    script = read_config(weights)["script"]
    if script not in KEYS or os.path.realpath(weights) in inside:
        raise ValueError(f"{weights}: a run that cannot be started from ({script or 'of no known script'})")
    _, pipe, unet = load_run(weights, "", device, script, inside=inside)
    pipe.schedule.timesteps(steps)
    path = Path(weights) / f"{judged_by(weights)}.pt"
    return replace(pipe, unet=unet, fingerprint=digest(path))


def held_out_prompts(config: dict, size: int, toy: PromptSource | None, start: int, count: int) -> Prompts:
    """Held-out prompts of a run's kind: of its pictures, or where it had none, from `toy`."""
    if folder := config.get("data"):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: the run's pictures do not lie there; say by --data where they do")
        if config.get("pictures", own := picture_list(folder)) != own:  # others would be held out than were
            raise ValueError(f"{folder}: holds other pictures than the run had; say by --data where those lie")
        _, held_out, _ = picture_sources(folder, size, 0, config.get("held_out", 0))
        return held_out(start, count)
    assert toy is not None
    return toy(start, count)
