"""Checkpoints: a file says what it is, how it is configured, and holds tensors only.

A file is {"kind": …, "config": {…}, "state": {name: tensor}, "meta": {…}}; it is read with
`torch.load(weights_only=True)`, written beside its place, flushed and renamed: never half a file.
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def atomic_write(path: str | Path, write) -> None:
    """Calls write(temporary path), then moves the file into its place in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "r+b") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(
    path: str | Path,
    kind: str,
    config: Any,
    state: dict[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    meta: dict | None = None,
) -> None:
    """Writes one model. `config` is a dataclass or a dictionary; `dtype` converts fp32 tensors (others are kept)."""
    config = dict(config) if isinstance(config, dict) else dataclasses.asdict(config)
    tensors = {
        k: v.detach().cpu().to(dtype if dtype and v.dtype == torch.float32 else v.dtype).contiguous().clone()
        for k, v in state.items()
    }
    content = {"kind": kind, "config": config, "state": tensors, "meta": meta or {}}
    try:
        atomic_write(path, lambda p: torch.save(content, p))
    except RuntimeError as e:  # how torch reports a full disk
        raise OSError(f"{path}: could not be written ({e})") from e


def load(path: str | Path, kind: str) -> tuple[dict, dict[str, Tensor], dict]:
    """-> config, state (fp16 widened to fp32), meta. Raises FileNotFoundError or ValueError in plain words."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; expected a file that holds a {kind}")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load itself verifies no checksum
                raise ValueError("damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: cannot be read as a checkpoint; it is cut short or of another format") from e
    if not (isinstance(content, dict) and {"kind", "config", "state"} <= set(content)):
        raise ValueError(f"{path}: not a minipref checkpoint (it lacks kind, config and state)")
    if content["kind"] != kind:
        raise ValueError(f"{path}: holds a {content['kind']}, expected a {kind}")
    state = {k: v.float() if v.dtype == torch.float16 else v for k, v in content["state"].items()}
    return content["config"], state, content.get("meta", {})


def build(config_class: type, model_class: type, config: dict, state: dict[str, Tensor], path: str | Path) -> nn.Module:
    """The model that a checkpoint describes, in eval mode; one line that says so where the two do not fit."""
    try:
        model = model_class(config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}))
    except (TypeError, ValueError, ArithmeticError) as e:
        raise ValueError(f"{path}: its configuration does not fit {config_class.__name__}: {e}") from e
    fill(model, state, path)
    return model.eval()


def fill(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """model.load_state_dict with an error of one line."""
    own = model.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    wrong = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or extra or wrong:
        first = (wrong or [f"missing {k}" for k in missing] or [f"unknown {k}" for k in extra])[0]
        raise ValueError(
            f"{path}: weights of another configuration ({len(missing)} tensors missing, {len(extra)} unknown, "
            f"{len(wrong)} of another shape; first: {first})"
        )
    model.load_state_dict(state)
