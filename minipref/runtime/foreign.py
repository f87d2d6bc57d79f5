"""Code that is not ours, such as a reward of the user's: what it changes for the whole process is undone."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class ForeignError(Exception):
    """What code that is not ours has raised."""


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return ""


def _set_filters(filters: list) -> None:
    warnings.resetwarnings()
    warnings.filters[:] = filters  # type: ignore[index]


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _handlers() -> list:
    """What answers Ctrl-C and SIGTERM; only the main thread may set it."""
    main = threading.current_thread() is threading.main_thread()
    return [(kind, signal.getsignal(kind)) for kind in (signal.SIGINT, signal.SIGTERM) if main]


def _set_environment(values: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)


def _set_streams(streams: tuple[Any, Any]) -> None:
    sys.stdout, sys.stderr = streams


# How a setting is read, and how it is set again where it has changed.
SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, lambda v: torch.set_default_device(None if v == torch.device("cpu") else v)),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda v: torch.use_deterministic_algorithms(v[0], warn_only=v[1]),
    ),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (np.geterr, lambda v: np.seterr(**v)),
    (lambda: torch.is_autocast_enabled("cpu"), lambda v: torch.set_autocast_enabled("cpu", v)),
    (lambda: torch.is_autocast_enabled("cuda"), lambda v: torch.set_autocast_enabled("cuda", v)),
    (_folder, os.chdir),
    (_umask, os.umask),
    (lambda: dict(os.environ), _set_environment),
    (_handlers, lambda v: [signal.signal(*each) for each in v]),
    (lambda: list(warnings.filters), _set_filters),
    (lambda: (sys.stdout, sys.stderr), _set_streams),
]


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # it is not our code, either
        return "it does not say what"


@contextmanager
def foreign_code() -> Iterator[None]:
    """Around code that is not ours: whatever it does to random generators and SETTINGS is undone, and what it raises,
    sys.exit included, becomes a ForeignError."""
    before = [get() for get, _ in SETTINGS]
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        raise ForeignError(f"{type(e).__name__}: {_said(e)}") from e
    finally:
        for (get, set_again), value in zip(SETTINGS, before):
            if get() != value:
                set_again(value)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
