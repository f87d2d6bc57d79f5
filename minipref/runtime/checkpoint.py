"""Checkpoints: a file says what it is, how it is configured, and holds tensors only.

A file is {"kind": …, "config": {…}, "state": {name: tensor}, "meta": {…}}; it is read with
`torch.load(weights_only=True)`, written beside its place, flushed and renamed: never half a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import tempfile
import time
import types
import typing
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

UMASK = os.umask(0o022)  # of this process: asking sets it
os.umask(UMASK)

LEFT_OVER = 3600  # seconds after which a temporary file in a run folder is one that a killed process left
OURS = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp(\.\w+)?")  # names of temporary files, as `atomic_write` has them made
_run_folders: set[Path] = set()


def protect(folder: str | Path) -> None:
    """From now on nothing is written through a link below this run folder (the folder itself may be reached by one): a
    run from elsewhere must not make us write elsewhere. Removes what a killed process has left in it."""
    folder = Path(os.path.abspath(folder))
    _run_folders.add(folder)
    for path in (*folder.glob(".*.tmp*"), *folder.glob("samples/.*.tmp*")):
        ours = OURS.fullmatch(path.name) and not path.is_symlink() and path.is_file()
        if ours and time.time() - path.stat().st_mtime > LEFT_OVER:
            path.unlink()


def _refuse_links(path: Path) -> None:
    path = Path(os.path.abspath(path))
    for root in _run_folders & set(path.parents):
        for part in path.parents:
            if part == root:
                break
            if part.is_symlink():
                raise ValueError(f"{part}: is a link; nothing is written through links inside a run folder")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes a file: an error names it, and says in plain words when the disk is full."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # RuntimeError: how torch reports a full disk
        if isinstance(e, RuntimeError) and "out of memory" in str(e):
            raise
        raise OSError(f"{path}: could not be written ({_reason(e, path)})") from e


def atomic_write(path: str | Path, write: Callable[[Path], object], *, flush: bool = True) -> None:
    """Calls write(temporary path), flushes, and moves the file into its place in one step: whole or not at all.

    The temporary file lies beside its place; its name cannot be guessed and it is made anew, never a link. Without
    `flush`, for thousands of files, a power cut may take them. Raises OSError that names the file, ValueError where its
    folder is a link inside a run folder.
    """
    path = Path(path)
    _refuse_links(path)
    temporary = None
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.stem[:60]}.", suffix=f".tmp{path.suffix}", dir=path.parent)
            os.close(handle)
            temporary = Path(name)
            write(temporary)
            if flush:
                with open(temporary, "r+b") as f:
                    os.fsync(f.fileno())
            os.chmod(temporary, 0o666 & ~UMASK)
            os.replace(temporary, path)
            if flush:
                _flush_folder(path.parent)
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """A text file, whole or not at all; names of files in it that are no UTF-8 keep their bytes."""
    atomic_write(path, lambda p: p.write_text(text, encoding="utf-8", errors="surrogateescape"))


def append_text(path: Path, text: str) -> None:
    """Adds to a text file, or makes it; where the disk is full it is left as it was."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with writing(path), open(path, "a", encoding="utf-8") as f:
            f.write(text)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def check_place(path: str | Path, flag: str) -> None:
    """Refuses, before the work, a file to write that exists already or whose folder cannot be written to."""
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise ValueError(f"{flag} {path}: is there already; name another file")
    check_folder(path.absolute().parent, f"{flag} {path}")


def check_folder(folder: str | Path, name: str) -> None:
    """Refuses, before the work, a folder that can neither be written to nor made; `name`: what asked for it."""
    folder = Path(folder).absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists() or p.is_symlink())  # a link to nothing, too
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: {there} is no folder that can be written to")


def free_name(path: Path) -> Path:
    """The path itself, or its first sibling NAME-2, NAME-3 … that does not exist."""
    for i in range(1, 10_000):
        candidate = path if i == 1 else path.with_name(f"{path.stem}-{i}{path.suffix}")
        if not candidate.exists() and not candidate.with_suffix("").is_dir():
            return candidate
    raise ValueError(f"{path}: thousands like it lie there; name another")


def _reason(error: BaseException, path: Path) -> str:
    cause: BaseException | None = error
    while cause and not isinstance(cause, OSError):  # torch covers the system's error with one of its own
        cause = cause.__context__
    with contextlib.suppress(OSError):
        if getattr(cause, "errno", None) == errno.ENOSPC or shutil.disk_usage(path.parent).free < 1 << 20:
            return "the disk is full"
    return str(getattr(cause, "strerror", None) or error)


def _flush_folder(folder: Path) -> None:
    """A renamed file outlasts a power cut only when its folder is flushed, too; not every system offers that."""
    with contextlib.suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as f:  # given a path, torch would put its random name into the file
            torch.save(content, f)

    atomic_write(path, write)


def load(path: str | Path, kind: str) -> tuple[dict, dict[str, Tensor], dict]:
    """-> config, state (fp16 widened to fp32), meta. Raises FileNotFoundError or ValueError in plain words."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; expected a file that holds a {kind}")
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                raise ValueError("compressed")  # a small file could hold more than any memory; torch compresses none
            if archive.testzip():  # torch.load itself verifies no checksum
                raise ValueError("damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: cannot be read as a checkpoint; it is cut short or of another format") from e
    if not (isinstance(content, dict) and {"kind", "config", "state"} <= set(content)):
        raise ValueError(f"{path}: not a minipref checkpoint (it lacks kind, config and state)")
    if content["kind"] != kind:
        raise ValueError(f"{path}: holds a {content['kind']}, expected a {kind}")
    config, state, meta = content["config"], content["state"], content.get("meta", {})
    tensors = isinstance(state, dict) and all(isinstance(k, str) and _is_plain(v) for k, v in state.items())
    if not (tensors and isinstance(config, dict) and isinstance(meta, dict)):
        raise ValueError(
            f"{path}: not a minipref checkpoint (its config or meta is no dictionary, or its state no tensors)"
        )
    return config, {k: v.float() if v.dtype == torch.float16 else v for k, v in state.items()}, meta


def _is_plain(v: Any) -> bool:
    """Whether it is a dense tensor in memory that holds all of its numbers: none expanded from a few."""
    dense = isinstance(v, Tensor) and v.layout == torch.strided and v.device.type == "cpu" and not v.is_quantized
    return dense and v.untyped_storage().nbytes() >= v.numel() * v.element_size()


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation such as `int | tuple[int, ...]` says."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is types.UnionType:
        return any(_fits(value, option) for option in inner)
    if kind is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(v, inner[0]) for v in value)
    if kind is dict and inner:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    return type(value) is kind or kind is float and type(value) is int


def configured(config_class: type, values: Any, path: str | Path) -> Any:
    """The configuration that a file describes; ValueError in one line where it has other names or types."""
    hints = typing.get_type_hints(config_class)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: its configuration does not fit {config_class.__name__} (no dictionary)")
    wrong = [f"{k}: {type(v).__name__}" for k, v in values.items() if k not in hints or not _fits(v, hints[k])]
    fields = dataclasses.fields(config_class)
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    if wrong or needed - set(values):
        reason = (wrong or [f"{k} is missing" for k in sorted(needed - set(values))])[0]
        raise ValueError(f"{path}: its configuration does not fit {config_class.__name__} ({reason})")
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def build(config_class: type, model_class: type, config: dict, state: dict[str, Tensor], path: str | Path) -> nn.Module:
    """The model that a checkpoint describes, in eval mode; one line that says so where the two do not fit."""
    built = configured(config_class, config, path)
    try:
        with torch.device("meta"):  # no memory is taken before it is known to fit
            check_fit(model_class(built), state, path)
        model = model_class(built)
    except Misfit:
        raise
    except Exception as e:  # whatever values of wrong types lead to
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"
        raise ValueError(f"{path}: its configuration does not fit {config_class.__name__} ({reason})") from e
    model.load_state_dict(state)
    return model.eval()


class Misfit(ValueError):
    """Weights of another configuration."""


def check_fit(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Raises Misfit, in one line, where names, shapes or kinds of numbers of `state` are not the model's."""
    own = model.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    pairs = [(k, own[k], state[k]) for k in own if k in state]
    wrong = [f"{k} {tuple(b.shape)} for {tuple(a.shape)}" for k, a, b in pairs if a.shape != b.shape]
    wrong += [f"{k} {b.dtype}" for k, a, b in pairs if a.is_floating_point() != b.is_floating_point()]
    if missing or extra or wrong:
        first = (wrong or [f"missing {k}" for k in missing] or [f"unknown {k}" for k in extra])[0]
        raise Misfit(
            f"{path}: weights of another configuration ({len(missing)} tensors missing, {len(extra)} unknown, "
            f"{len(wrong)} of another shape or kind; first: {first})"
        )


def fill(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """model.load_state_dict with an error of one line."""
    check_fit(model, state, path)
    model.load_state_dict(state)
