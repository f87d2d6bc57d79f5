"""`python tutorials/run.py 3`: runs a tutorial's code, top to bottom, and draws its figures.

A tutorial is a Markdown file of `tutorials/`. Its fences ```` ```python ```` are executed in order in one namespace.
Fences ```` ```python exercise=2 ```` hold an exercise that checks itself: it fails until the reader fills the lines
between `# your lines` and `# check`; `--exercise 2 --answer FILE` tries the lines of a file. The fence
```` ```python solution=2 ```` holds ours.
"""

from __future__ import annotations

from minipref.runtime.config import opt, parse, run_main  # isort: skip  (first: it answers Ctrl-C)
import re
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from minipref.runtime.runlog import read_text

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))  # the training scripts, which tutorials import, live at the top
YOURS, CHECK = "# your lines", "# check"


@dataclass(frozen=True)
class TutorialConfig:
    number: int = opt(1, "which tutorial (the flag's name may be left out)", lo=1, hi=8)
    exercise: int = opt(0, "try one exercise; 0: run the tutorial", lo=0, hi=99)
    answer: str = opt("", "file with your lines for the exercise; empty: our solution")
    threads: int = opt(0, "CPU threads; 0 leaves torch's choice", lo=0, hi=1024)


@dataclass(frozen=True)
class Fence:
    code: str
    line: int  # of the Markdown file, where the code begins
    kind: str  # "", "exercise" or "solution"
    number: int  # of the exercise


def find(number: int) -> Path:
    """The file of tutorial `number`; ValueError that lists what there is."""
    found = sorted(FOLDER.glob(f"{number}_*.md"))
    if not found:
        there = ", ".join(p.name for p in sorted(FOLDER.glob("[0-9]*_*.md")))
        raise ValueError(f"tutorial {number}: there is none; choose from {there}")
    return found[0]


def fences(text: str) -> list[Fence]:
    """The Python fences of a Markdown text, in order. Others (sh, math, text) are left alone."""
    found = []
    pattern = re.compile(r"^```python(?: (exercise|solution)=(\d+))?\n(.*?)^```$", re.M | re.S)
    for m in pattern.finditer(text):
        line = text.count("\n", 0, m.start(3)) + 1
        found.append(Fence(m[3], line, m[1] or "", int(m[2] or 0)))
    return found


class Left(Exception):
    """An answer must not end the check that judges it."""


def execute(code: str, names: dict, path: Path, line: int) -> None:
    """Runs code as if it stood in the Markdown file, so that an error names the file's own line."""
    try:
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), names)
    except (Exception, KeyboardInterrupt):
        raise
    except SystemExit as e:
        raise Left(f"sys.exit({e.code!r}) is no answer").with_traceback(e.__traceback__) from None
    except BaseException as e:  # which no `except Exception` would catch
        raise Left(f"raise {e!r} is no answer").with_traceback(e.__traceback__) from None


def given(exercise: Fence) -> tuple[str, str, str]:
    """An exercise in three parts: what comes first, the reader's lines as they stand there, the check."""
    head, marker, rest = exercise.code.partition(YOURS + "\n")
    lines, check, tail = rest.partition(CHECK + "\n")
    if not (marker and check):
        raise ValueError(f"exercise {exercise.number}: lacks its lines {YOURS!r} and {CHECK!r}")
    return head, lines, tail


def attempt(exercise: Fence, answer: str, names: dict, path: Path, answer_path: Path | None = None) -> None:
    """Runs an exercise with `answer` in place of the reader's lines. Errors name the line of the file they are in."""
    head, lines, tail = given(exercise)
    execute(head, names, path, exercise.line)
    mine = exercise.line + head.count("\n") + 1
    execute(answer, names, answer_path or path, 1 if answer_path else mine)
    execute(tail, names, path, mine + lines.count("\n") + 1)


def run(number: int, *, until_exercise: int = 0) -> dict:
    """Executes a tutorial's fences in order (up to an exercise, if one is named). -> what they have defined."""
    path, names = find(number), {"__name__": "tutorial"}
    torch.manual_seed(0)
    for fence in fences(path.read_text(encoding="utf-8")):
        if fence.kind == "exercise" and fence.number == until_exercise:
            break
        if not fence.kind:
            execute(fence.code, names, path, fence.line)
    return names


def try_exercise(number: int, exercise: int, answer: Path | None) -> None:
    """Runs the tutorial up to an exercise, and that with the lines of a file (None: our solution)."""
    path = find(number)
    every = fences(path.read_text(encoding="utf-8"))
    asked = [f for f in every if f.kind == "exercise" and f.number == exercise]
    if not asked:
        there = ", ".join(str(f.number) for f in every if f.kind == "exercise")
        raise ValueError(f"tutorial {number}: no exercise {exercise}; there are {there}")
    if answer is None:
        code = next(f.code for f in every if f.kind == "solution" and f.number == exercise)
    else:
        code = read_text(answer)
    attempt(asked[0], code, run(number, until_exercise=exercise), path, answer)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].isdigit():  # `run.py 3` for `run.py --number 3`
        argv = ["--number", *argv]
    cfg = parse(TutorialConfig, argv, prog="tutorials/run.py", description=__doc__ or "")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    started, path = time.time(), find(cfg.number)
    if not cfg.exercise:
        run(cfg.number)
        print(f"{path.name}: ran to the end in {time.time() - started:.0f} s; figures are in {FOLDER / 'figures'}")
        return
    answer = Path(cfg.answer) if cfg.answer else None
    try:
        try_exercise(cfg.number, cfg.exercise, answer)
    except AssertionError as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        raise ValueError(
            f"exercise {cfg.exercise}: not yet. {e or 'This check fails'} ({path.name}:{where.lineno})"
        ) from None
    except Exception as e:
        known = {str(path), str(answer)}
        frames = [(f.filename, f.lineno) for f in traceback.extract_tb(e.__traceback__) if f.filename in known]
        if isinstance(e, SyntaxError):
            frames = [(e.filename or "", e.lineno)]
        if answer is None or not frames:  # no fault of the reader's lines
            raise
        file, line = frames[-1]
        reason = f"{type(e).__name__}: {e}"
        if isinstance(e, NameError) and file == str(path):
            reason = f"your lines must set {e.name!r}"
        raise ValueError(f"exercise {cfg.exercise}: {Path(file).name}:{line}: {reason}") from None
    print(f"exercise {cfg.exercise}: " + ("right" if answer else "our solution passes; try yours by --answer FILE"))


if __name__ == "__main__":
    run_main("tutorials/run.py", main)
