"""A run reopened: its configuration, base model and trained weights, by whichever version it was written."""

from __future__ import annotations

from pathlib import Path

import torch

from .data.prompts import Prompts, PromptSource, picture_sources
from .models.unet import UNet
from .pipeline import Pipeline, load_unet
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
# What the configuration of a run must hold for the tools that read it.
KEYS = {
    "train_rl.py": ("weights", "data", "reward", "seed", "held_out", "eval_prompts", "sampling_steps", "eta"),
    "train_rpo.py": ("weights", "references", "lam_val", "sampling_steps", "guidance", "eta"),
}


def read_config(folder: str | Path) -> dict:
    """The configuration of a finished or interrupted run under today's names, its script as "script"."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no run lies there (config.json is missing)")
    config = read_json(path)
    if "script" in config:
        return config
    script = next((name for name, key in MARKS.items() if key in config), "")
    renamed = RENAMED.get(script, {})
    return {renamed.get(k, k): v for k, v in config.items()} | {"script": script}


def judged_by(folder: str | Path) -> str:
    """Which weights a run speaks of: "best" of RPO and where RL's guard has stopped it, by its log; else "last"."""
    log = Path(folder) / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    stopped = bool(lines) and '"stopped": true' in lines[-1]
    return "best" if stopped or read_config(folder)["script"] == "train_rpo.py" else "last"


def load_run(folder: str, which: str, device: str, script: str = "train_rl.py") -> tuple[dict, Pipeline, UNet]:
    """-> a run's configuration, the base model's pipeline, and the trained UNet: last, best, or (which "") the one that
    its summary was judged by."""
    config = read_config(folder)
    path = Path(folder) / f"{which or judged_by(folder)}.pt"
    if missing := set(KEYS[script]) - set(config):
        raise ValueError(f"{Path(folder) / 'config.json'}: no run of {script}, it lacks {', '.join(sorted(missing))}")
    pipe = Pipeline.load(config["weights"], device)
    aligned, _, meta = load_unet(path)
    if meta.get("base") != pipe.fingerprint:
        raise ValueError(f"{path}: was trained from another base model than {config['weights'] or 'the shipped one'}")
    if aligned.config != pipe.unet.config:
        raise ValueError(f"{path}: its UNet is configured differently from the base model's ({pipe.unet.config})")
    return config, pipe, aligned.to(memory_format=torch.channels_last).to(pipe.device)  # type: ignore[call-overload]


def held_out_prompts(config: dict, size: int, toy: PromptSource | None, start: int, count: int) -> Prompts:
    """Held-out prompts of a run's kind: of its pictures, or where it had none, from `toy`."""
    if config.get("data"):
        _, held_out, _ = picture_sources(config["data"], size, 0, config.get("held_out", 0))
        return held_out(start, count)
    assert toy is not None
    return toy(start, count)
