"""A run is a folder: config.json, command.txt, metrics.jsonl, curves.png, samples/, last.pt, best.pt, summary.json."""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from .. import __version__
from .checkpoint import append_text, protect, write_text


def _plain(value: Any) -> Any:
    """JSON has no NaN: it becomes null; floats are kept to seven digits."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def read_text(path: Path) -> str:
    """A text file, with or without the mark that Windows puts before UTF-8. One line says what is wrong with it."""
    if not path.is_file():  # nor a pipe, which would wait for ever
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: is not UTF-8 text ({e.reason} at byte {e.start}); save it as such") from None


def read_json(path: Path) -> dict:
    """An object of a JSON file, empty where there is none. ValueError in one line where it cannot be read."""
    if not path.is_file():
        return {}
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not readable as JSON, cut short or damaged ({e})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object")
    return content


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl. ValueError in one line where it cannot be read."""
    text = read_text(path)
    try:
        return [json.loads(line) for line in text.splitlines()]
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not readable as lines of JSON, cut short or damaged ({e})") from None


class RunFolder:
    """Creates the folder and writes into it; nothing that lies there is ever overwritten by another run."""

    def __init__(self, out: str, default: str, config: dict, script: str):
        self.path = Path(out) if out else self._free(Path(default))
        if self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir())):
            raise ValueError(f"--out {self.path}: holds something already; name another folder")
        try:
            (self.path / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OSError(f"--out {self.path}: cannot be made ({e.strerror}: {e.filename})") from e
        protect(self.path)
        self.rows: list[dict] = []
        versions = {"minipref": __version__, "torch": torch.__version__, "python": platform.python_version()}
        self.write_json("config.json", config | {"script": script, "versions": versions})
        write_text(self.path / "command.txt", shlex.join(["python", *sys.argv]) + "\n")
        append_text(self.path / "metrics.jsonl", "")

    @staticmethod
    def _free(path: Path) -> Path:
        for i in range(1, 10_000):
            candidate = path if i == 1 else path.with_name(f"{path.name}-{i}")
            if not candidate.exists():
                return candidate
        raise ValueError(f"{path}: thousands of runs lie there; name a folder with --out")

    def log(self, **row: Any) -> None:
        """Appends one line to metrics.jsonl."""
        self.rows.append(row)
        append_text(self.path / "metrics.jsonl", json.dumps(_plain(row)) + "\n")

    def write_json(self, name: str, content: dict) -> None:
        write_text(self.path / name, json.dumps(_plain(content), indent=2) + "\n")

    def column(self, key: str, x: str = "epoch") -> tuple[list[float], list[float]]:
        """x and y of the rows that carry `key`."""
        pairs = [(r[x], r[key]) for r in self.rows if r.get(key) is not None]
        return [a for a, _ in pairs], [b for _, b in pairs]


class _Lines:
    """tqdm's output on a pipe: a line for each refresh instead of carriage returns."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(items: Iterable, description: str, leave: bool = True) -> tqdm:
    """A progress bar on a terminal, wiped when done unless `leave`; one line every ten seconds on a pipe."""
    if sys.stderr.isatty():
        return tqdm(items, description, leave=leave, mininterval=0.5, dynamic_ncols=True)
    return tqdm(
        items, description, leave=leave, mininterval=10, maxinterval=10, ncols=100, file=_Lines(sys.stderr), ascii=True
    )


def peak_memory_mb() -> float:
    """The most memory that this process has held, in MB (10⁶ bytes); NaN on Windows."""
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
