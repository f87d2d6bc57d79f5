"""Subjects for RPO: an unnamed instance in a few pictures, and prompts that place it on a background or beside things.

Pictures come from a folder in DreamBench's layout (Ruiz et al. 2023): one folder a subject, 00.jpg, 01.jpg …
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.tokenizer import SUBJECT  # "[V]" stands for the subject in every prompt
from ..runtime.runlog import read_text
from .pictures import read_folder


@dataclass(frozen=True)
class SubjectPrompt:
    """A prompt for a subject; `truth`: what must be seen, for those who know (the toy world), else None."""

    text: str
    truth: Any = None


@dataclass(frozen=True)
class Subject:
    """One instance: `references` (R, 3, H, W) in [0, 1], and its class, "square" or "dog".

    `truth`: what it is, for those who know (the toy world); None for photos.
    """

    name: str
    class_name: str
    references: Tensor
    truth: Any = None


def instance_prompt(class_name: str) -> str:
    """What the references are called while training (RPO Eq. 4)."""
    return f"a photo of a {SUBJECT} {class_name}"


# Prompts of the released code (github.com/andrew-miao/RPO, utils.py), {} for "[V] class". The paper validates on eight
# prompts of their own; some versions of the released code validate on its *training* prompts, so that it stops
# by what it trains on. Its function for validation prompts lists the first two of VALIDATION; the other six are ours.
TRAINING = (
    "a {} in Vincent Van Gogh rendition", "a {} on the Moon", "a green {}",
    "a {} with a China Great Wall in the background", "a {} on top of wooden roof",
    "a {} with the Statue of Liberty in the background", "a {} with a volcano in the background",
    "a {} on a subway platform",
)  # fmt: skip
TRAINING_LIVE = (
    "a {} wearing a green outfit", "a {} in Vincent Van Gogh rendition",
    "a {} with a China Great Wall in the background", "a {} is swimming in a pool", "a {} on a subway platform",
    "a {} with the Statue of Liberty in the background", "a {} on the Moon", "a green {}",
)  # fmt: skip
VALIDATION = (
    "a {} in a beautiful garden", "a {} at the beach during sunset", "a {} on a bridge", "a {} in a library",
    "a {} in front of a brick wall", "a {} with a lake in the background", "a {} in a desert", "a blue {}",
)  # fmt: skip


LIVE = ("cat", "dog")  # DreamBench's live classes
OWN_TEST = tuple(
    f"a {{}} {where}"
    for where in (
        "in the rain", "on a table", "in a box", "on a bench", "under a tree", "in a kitchen", "next to a book",
        "next to a lamp", "on a carpet", "by a river", "on a roof", "in a train", "in a museum", "on a farm",
        "in a cave", "on a boat", "in a garage", "on an island", "in a field of flowers", "on a stage",
        "with a castle in the background", "with a tower in the background", "in fog", "at night", "made of glass",
    )
)  # fmt: skip


def dreambench_prompts(path: Path, live: bool) -> list[str]:
    """The 25 test prompts of DreamBench's prompts_and_classes.txt, with {} for "[V] class"."""
    text = _read(path)
    parts = re.split(r"(?m)^(Object|Live Subject) Prompts\s*$", text)
    wanted = "Live Subject" if live else "Object"
    if wanted not in parts:
        raise ValueError(f"{path}: holds no section {wanted} Prompts")
    formats = re.findall(r"^'(.*)'\.format", parts[parts.index(wanted) + 1], re.M)
    if not formats:
        raise ValueError(f"{path}: its section {wanted} Prompts lists no prompt")
    prompts = [p.replace("{0} {1}", "{}") for p in formats]
    for p in prompts:
        if p.count("{}") != 1 or re.search(r"[{}]", p.replace("{}", "")):
            raise ValueError(f"{path}: the prompt {p!r} should hold '{{0}} {{1}}', token and class, once")
    return prompts


def dreambench_class(path: Path, name: str) -> str:
    """The class that prompts_and_classes.txt gives a subject's folder, "" where it does not list it."""
    match = re.search(rf"^{re.escape(name)},(.+)$", _read(path), re.M)
    return match[1].strip() if match else ""


def _read(path: Path) -> str:
    """The text of a list of prompts, with plain spaces. It is printed later: a sequence that steers a terminal must not
    be in it."""
    lines = ["".join(" " if c.isspace() else c for c in line) for line in read_text(path).split("\n")]
    if wrong := [line for line in lines if not line.isprintable()]:
        raise ValueError(f"{path}: holds a control character, in {wrong[0][:60]!r}")
    return "\n".join(lines)


def classes_file(folder: Path) -> Path | None:
    """prompts_and_classes.txt beside a subject's folder."""
    path = folder.resolve().parent / "prompts_and_classes.txt"
    return path if path.is_file() else None


def photo_subject(folder: str | Path, class_name: str, size: int) -> tuple[Subject, list[str]]:
    """A subject from a folder of pictures, and a line for each that was skipped. Its class may be DreamBench's."""
    folder = Path(folder)
    images, files, skipped = read_folder(folder, size)
    if {f.parent for f in files} != {folder}:
        raise ValueError(f"--references {folder}: holds pictures in sub-folders; name the folder of one subject")
    listing = classes_file(folder)
    class_name = class_name.strip() or (dreambench_class(listing, folder.resolve().name) if listing else "")
    if SUBJECT in class_name or not re.search(r"\w", class_name.replace("_", "")):
        class_name = ""
    if not class_name:
        raise ValueError(f"--references {folder}: say what it shows by --class-name, a word or two such as dog")
    if len(images) < 2:
        reason = f"; skipped {len(skipped)}, the first: {skipped[0]}" if skipped else ""
        raise ValueError(
            f"--references {folder}: a single readable picture; take two or more, best four to six{reason}"
        )
    return Subject(folder.resolve().name, class_name, images), skipped


def photo_prompts(subject: Subject, folder: str | Path, live: bool) -> list[list[SubjectPrompt]]:
    """Training, validation and test prompts of a photographed subject; the test prompts are DreamBench's where its file
    lies beside the folder, else others of ours. Cats and dogs of DreamBench live without being told to."""
    listing = classes_file(Path(folder))
    name = f"{SUBJECT} {subject.class_name}"
    live = live or (listing is not None and dreambench_class(listing, subject.name) in LIVE)
    training = TRAINING_LIVE if live else TRAINING
    test = dreambench_prompts(listing, live) if listing else OWN_TEST
    return [[SubjectPrompt(p.replace("{}", name)) for p in prompts] for prompts in (training, VALIDATION, test)]


def own_prompts(path: str | Path, counts: tuple[int, int, int]) -> list[list[SubjectPrompt]]:
    """Prompts of a text file, one a line: the first train, the next validate, the next test, as many as `counts`."""
    lines = [line.strip() for line in _read(Path(path)).split("\n") if line.strip()]
    words = [tuple(re.findall(r"\w+", line.replace(SUBJECT, " ").lower())) for line in lines]
    for line, rest in zip(lines, words):
        if SUBJECT not in line:
            raise ValueError(f"--prompt-file {path}: {line!r} lacks {SUBJECT}, the name of the subject")
        if not rest:
            raise ValueError(f"--prompt-file {path}: {line!r} says nothing beside {SUBJECT}")
    starts = 0, counts[0], counts[0] + counts[1]
    seen = set[tuple[str, ...]]()
    for line, rest in zip(lines, words):
        if rest in seen:
            raise ValueError(f"--prompt-file {path}: {line!r} stands there twice; a prompt serves for one purpose")
        seen.add(rest)
    if len(lines) <= starts[2]:
        raise ValueError(
            f"--prompt-file {path}: {len(lines)} prompts; {counts[0]} train, {counts[1]} validate, the next test"
        )
    ends = starts[1], starts[2], starts[2] + counts[2]
    return [[SubjectPrompt(p) for p in lines[a:b]] for a, b in zip(starts, ends)]


def load_prompts(
    subject: Subject, folder: str | Path, live: bool, prompt_file: str, counts: tuple[int, int, int]
) -> list[list[SubjectPrompt]]:
    """So many training, validation and test prompts of a photographed subject (of a file's, as many as are left)."""
    if prompt_file:
        if live:
            raise ValueError("--live: chooses among DreamBench's prompts; --prompt-file brings its own")
        return own_prompts(prompt_file, counts)
    lists = photo_prompts(subject, folder, live)
    for name, prompts, n in zip(("train", "val", "test"), lists, counts):
        if n > len(prompts):
            raise ValueError(f"--{name}-prompts {n}: there are {len(prompts)}; list your own by --prompt-file FILE")
    return [prompts[:n] for prompts, n in zip(lists, counts)]
