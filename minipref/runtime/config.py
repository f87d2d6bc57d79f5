"""Configuration: one frozen dataclass per script, its command line generated from it.

A field is written `lr: float = opt(3e-5, "learning rate of AdamW (PrefPaint: 2e-6)", lo=0)`: default, meaning, range.
Presets are dictionaries of values; flags override them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import sys
import threading
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

Config = TypeVar("Config")


def _interrupted(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """sys.excepthook: Ctrl-C while a script still imports torch is one line, too. Scripts import this file first."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
    sys.exit(130)


if sys.excepthook is sys.__excepthook__:  # a notebook's own stays
    sys.excepthook = _interrupted

MOST = 1_000_000_000  # upper limit of a number that has none of its own
LONGEST = 299  # characters of a message
PICTURES = 100_000  # of pictures that are held in memory at a time: a gigabyte of small ones


def opt(default: Any, help: str, *, lo: float | None = None, hi: float | None = None, choices: tuple | None = None):
    """A field with its meaning, and the values that it allows (bounds included); every number has an upper limit."""
    if hi is None and isinstance(default, (int, float)) and not isinstance(default, bool):
        hi = MOST
    return dataclasses.field(default=default, metadata={"help": help, "lo": lo, "hi": hi, "choices": choices})


class _OneLineParser(argparse.ArgumentParser):
    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(status, message and one_line(message) + "\n")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the flags\n")


def _scalar(hint: Any) -> type:
    """The type of a flag's value: `float` of `float | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(o for o in options if o is not type(None))


def validate(config: Any) -> None:
    """Raises ValueError naming the first field whose value lies outside its range."""
    for f in dataclasses.fields(config):
        value, m = getattr(config, f.name), f.metadata
        flag = "--" + f.name.replace("_", "-")
        if m.get("choices") and value not in m["choices"]:
            raise ValueError(f"{flag} {value}: choose from {', '.join(map(str, m['choices']))}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ValueError(f"{flag} {value}: not a finite number")
            if m.get("lo") is not None and value < m["lo"] or m.get("hi") is not None and value > m["hi"]:
                lo, hi = ("−∞" if m["lo"] is None else m["lo"]), ("∞" if m["hi"] is None else m["hi"])
                raise ValueError(f"{flag} {value}: out of range, allowed are {lo} to {hi}")


def check_pictures(config: Any, *counts: str) -> None:
    """Refuses, before the work, more pictures at a time than a machine holds. `counts`: names of fields, or several
    that multiply, as in "prompts samples"."""
    for names in map(str.split, counts):
        if math.prod(getattr(config, name) for name in names) > PICTURES:
            flags = " ".join(f"--{name.replace('_', '-')} {getattr(config, name)}" for name in names)
            raise ValueError(f"{flags}: more than {PICTURES:,} pictures at a time")


def parse(
    cls: type[Config],
    argv: list[str] | None,
    *,
    prog: str,
    description: str,
    presets: dict[str, dict] | None = None,
    renamed: dict[str, str] | None = None,
) -> Config:
    """The configuration that a command line asks for. A wrong flag or value ends in one line and exit code 2.

    Where there are `presets`, one must be named; its name is the field `preset`. `renamed`: old name of a field ->
    today's; an old flag is answered by it.
    """
    presets = presets or {}
    raw = argparse.RawDescriptionHelpFormatter
    parser = _OneLineParser(prog=prog, description=description, allow_abbrev=False, formatter_class=raw)
    if presets:
        parser.add_argument("--preset", choices=sorted(presets), help="named set of values; flags override it")
        for name in presets:
            parser.add_argument(f"--{name}", dest="preset", action="store_const", const=name, help=f"--preset {name}")
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.name == "preset":
            continue
        flag, kind = "--" + f.name.replace("_", "-"), _scalar(hints[f.name])
        values = {"default": f.default} | {f"--{k}": v[f.name] for k, v in presets.items() if f.name in v}
        known = ", ".join(f"{k}: {v}" for k, v in values.items() if v != "")
        text = f"{f.metadata['help']}{f' ({known})' if known else ''}".replace("%", "%%")
        choices = [c for c in f.metadata["choices"] or () if c]
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(
                flag,
                type=kind,
                default=argparse.SUPPRESS,
                help=text,
                metavar="|".join(choices) or kind.__name__.upper(),
            )
    own = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for flag in (a.partition("=")[0] for a in (sys.argv[1:] if argv is None else argv)):
        old = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if old not in own and (new := (renamed or {}).get(old.removeprefix("no_"))):
            parser.exit(2, f"{prog}: {flag}: {new if ' ' in new else 'now --' + new.replace('_', '-')}\n")
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if value == "":  # a shell variable that is not set, most often
            parser.exit(2, f"{prog}: --{name.replace('_', '-')}: an empty value; leave the flag out\n")
    preset = given.get("preset")
    if presets and not preset:
        parser.exit(2, f"{prog}: name a preset: {', '.join(f'--{name}' for name in presets)}; --help lists the flags\n")
    config = cls(**{**(presets[preset] if preset else {}), **given})
    try:
        validate(config)
    except ValueError as e:
        parser.exit(2, f"{prog}: {e}\n")
    return config


def several(paths: str) -> list[str]:
    """What a flag names that takes one path or, separated by commas, several. One that exists may hold commas."""
    return [paths] if os.path.exists(paths) else [path for path in paths.split(",") if path]


def printable(text: str) -> str:
    """One line without control characters: a file's name must not be able to speak for the program."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """A message as one printable line; of a very long one, such as a name of thousands of letters, the middle is left
    out."""
    text = printable(" ".join(text.split()))
    return text if len(text) < LONGEST else f"{text[: LONGEST - 110]} … {text[-100:]}"


class Steady:
    """A stream that never ends a run: what its encoding lacks is escaped, and a closed end is nobody's fault. `lost`:
    the error by which something was, a full disk for example."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._steady():
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._steady():
            self.stream.flush()

    @contextlib.contextmanager
    def _steady(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:  # a full disk; a closed pipe, as of `| head`, wants no more
            if not isinstance(e, BrokenPipeError):
                self.lost = e
        except (ValueError, AttributeError):  # a closed stream, or none at all
            pass

    def settle(self) -> None:
        """At the end: what cannot be written is dropped, or Python would complain of it once more."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            try:
                self.stream.flush()
            except OSError:
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), self.stream.fileno())

    def isatty(self) -> bool:
        try:
            return bool(self.stream.isatty())
        except (OSError, ValueError, AttributeError):
            return False


def run_main(prog: str, main: Callable[[], None]) -> None:
    """Runs a script: errors that its user can mend are one line and exit code 2, not a traceback."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (s if isinstance(s, Steady) else Steady(s) for s in streams)

    def stop(message: str, code: int = 2) -> NoReturn:
        traceback.clear_frames(sys.exc_info()[2])  # closes progress bars: the message is the last line
        print(one_line(f"{prog}: {message}"), file=sys.stderr)
        sys.exit(code)

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # SIGTERM stops a run as Ctrl-C does
        signal.signal(signal.SIGTERM, interrupt)
    try:
        _run_and_print(main)
    except (ValueError, OSError) as e:
        stop(str(e))
    except (RuntimeError, MemoryError) as e:  # torch says of a CPU "can't allocate memory", of a GPU "out of memory"
        if not (isinstance(e, MemoryError) or "allocate memory" in str(e) or "out of memory" in str(e)):
            raise
        stop("out of memory; ask for fewer pictures or prompts at a time (--help lists the flags)")
    except KeyboardInterrupt:
        stop("interrupted; every file that was written is whole", 130)
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Steady):  # not a test's own
                stream.settle()
        sys.stdout, sys.stderr = streams


def _run_and_print(main: Callable[[], None]) -> None:
    """Runs main; OSError where what it printed was lost."""
    left = None
    try:
        main()
    except SystemExit as e:  # after --help, or where something is wrong with data
        if e.code not in (None, 0, 1):
            raise
        left = e
    sys.stdout.flush()
    if lost := getattr(sys.stdout, "lost", None):
        raise OSError(f"what it printed could not be written ({lost.strerror or lost})")
    if left:
        raise left
