"""Subjects for RPO: an unnamed instance in a few pictures, and prompts that place it on a background or beside things.

A toy subject is one thing whose pattern and colours no prompt names: "a [V] square". Pictures of your own come from a
folder in DreamBench's layout (Ruiz et al. 2023): one folder a subject, 00.jpg, 01.jpg …
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from .folders import read_folder
from .scenes import COLOURS, PATTERNS, RADII, SHAPES, SIZE, Scene, Thing, draw, random_thing

SUBJECT = "[V]"  # stands for the subject in every prompt; the tokenizers keep it as a spare token
REFERENCES = 4
SUBJECT_WORLD = 0  # toy subjects are the same for every seed of a run


@dataclass(frozen=True)
class Placed:
    """A prompt and, in the toy world, what must be seen beside the subject."""

    text: str
    background: str | None = None
    second: Thing | None = None  # its place does not matter


@dataclass(frozen=True)
class Subject:
    """One instance: `references` (R, 3, H, W) in [0, 1], and its class, "square" or "dog".

    `thing` is the toy's truth, None for photos.
    """

    name: str
    class_name: str
    references: Tensor
    thing: Thing | None = None


def toy_subject(seed: int, index: int, count: int = REFERENCES) -> Subject:
    """Subject number `index` of a world: shape, two colours and a pattern; each reference has another background."""
    rng = np.random.default_rng([seed, index, 2])
    shape, pattern = SHAPES[index % len(SHAPES)], PATTERNS[1 + rng.integers(len(PATTERNS) - 1)]
    colour, second = (COLOURS[i] for i in rng.choice(len(COLOURS), 2, replace=False))
    free = [c for c in COLOURS if c not in (colour, second)]
    backgrounds = [free[i] for i in rng.choice(len(free), min(count, len(free)), replace=False)]
    scenes = []
    for k in range(count):
        size = ("large", "small")[k % 2]
        spot = random_thing(rng, backgrounds[k % len(backgrounds)], size)
        thing = Thing(shape, colour, pattern, second, size, spot.x, spot.y, spot.radius)
        scenes.append(Scene(backgrounds[k % len(backgrounds)], (thing,)))
    name = f"{index:02d}: {colour} and {second} {pattern} {shape}"
    return Subject(name, shape, draw(scenes), scenes[0].things[0])


def toy_prompts(subject: Subject, seed: int, count: int) -> list[Placed]:
    """`count` different prompts that place a toy subject: on a background, beside a small plain thing, mostly both.

    No prompt asks for a colour of the subject behind it, or for a second thing of its own shape.
    """
    assert subject.thing is not None
    taken = {subject.thing.colour, subject.thing.second}
    backgrounds: list[str | None] = [c for c in COLOURS if c not in taken]
    seconds: list[Thing | None] = [
        Thing(shape, colour, "plain", colour, "small", 0.0, 0.0, RADII["small"])
        for shape in SHAPES
        for colour in COLOURS
        if shape != subject.class_name
    ]
    on: list[tuple[str | None, Thing | None]] = [(b, None) for b in backgrounds]
    beside: list[tuple[str | None, Thing | None]] = [(None, s) for s in seconds]
    both: list[tuple[str | None, Thing | None]] = [(b, s) for b in backgrounds for s in seconds if s and s.colour != b]
    rng = np.random.default_rng([seed, int(subject.name.partition(":")[0]), 3])
    piles = {k: [v[i] for i in rng.permutation(len(v))] for k, v in (("on", on), ("beside", beside), ("both", both))}
    if count > (most := sum(map(len, piles.values()))):
        raise ValueError(f"a toy subject has {most} prompts, not {count}")
    made: list[Placed] = []
    while len(made) < count:
        turn = ("both", "on", "beside", "both", "both", "beside", "both", "both")[len(made) % 8]
        name = next(k for k in (turn, "both", "beside", "on") if piles[k])
        background, second = piles[name].pop()
        text = f"a {SUBJECT} {subject.class_name}"
        text += f" and a small {second.colour} {second.shape}" if second else ""
        text += f" on {'an' if background[0] in 'aeiou' else 'a'} {background} background" if background else ""
        made.append(Placed(text, background, second))
    return made


def instance_prompt(class_name: str) -> str:
    """What the references are called while training (RPO Eq. 4)."""
    return f"a photo of a {SUBJECT} {class_name}"


# Prompts of the released code (github.com/andrew-miao/RPO, utils.py), {} for "[V] class". The paper validates on eight
# prompts, the code lists the first two of VALIDATION; the other six are ours, of the same kind.
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
    found = re.findall(r"^'(.*)'\.format", parts[parts.index(wanted) + 1], re.M)
    if not found:
        raise ValueError(f"{path}: its section {wanted} Prompts lists no prompt")
    prompts = [p.replace("{0} {1}", "{}") for p in found]
    for p in prompts:
        if re.sub(r"[^{}]", "", p) != "{}":
            raise ValueError(f"{path}: the prompt {p!r} should hold '{{0}} {{1}}', token and class, once")
    return prompts


def dreambench_class(path: Path, name: str) -> str:
    """The class that prompts_and_classes.txt gives a subject's folder, "" where it does not list it."""
    found = re.search(rf"^{re.escape(name)},(.+)$", _read(path), re.M)
    return found[1].strip() if found else ""


def _read(path: Path) -> str:
    """A text file, with or without the mark that Windows puts before UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: is not UTF-8 text; save it as such") from e


def classes_file(folder: Path) -> Path | None:
    """prompts_and_classes.txt beside a subject's folder."""
    path = folder.resolve().parent / "prompts_and_classes.txt"
    return path if path.is_file() else None


def photo_subject(folder: str | Path, class_name: str) -> tuple[Subject, list[str]]:
    """A subject from a folder of pictures, and a line for each that was skipped. Its class may be DreamBench's."""
    folder = Path(folder)
    images, files, skipped = read_folder(folder, SIZE)
    if {f.parent for f in files} != {folder}:
        raise ValueError(f"--references {folder}: holds pictures in sub-folders; name the folder of one subject")
    known = classes_file(folder)
    class_name = class_name.strip() or (dreambench_class(known, folder.resolve().name) if known else "")
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


def photo_prompts(subject: Subject, folder: str | Path, live: bool) -> list[list[Placed]]:
    """Training, validation and test prompts of a photographed subject; the test prompts are DreamBench's where its file
    lies beside the folder, else others of ours. Cats and dogs of DreamBench live without being told to."""
    known = classes_file(Path(folder))
    name = f"{SUBJECT} {subject.class_name}"
    live = live or (known is not None and dreambench_class(known, subject.name) in LIVE)
    training = TRAINING_LIVE if live else TRAINING
    test = dreambench_prompts(known, live) if known else OWN_TEST
    return [[Placed(p.format(name)) for p in prompts] for prompts in (training, VALIDATION, test)]


def own_prompts(path: str | Path, counts: tuple[int, int, int]) -> list[list[Placed]]:
    """Prompts of a text file, one a line: the first train, the next validate, the next test, as many as `counts`."""
    kept = [line.strip() for line in _read(Path(path)).splitlines() if line.strip()]
    words = [re.findall(r"\w+", line.replace(SUBJECT, " ").lower()) for line in kept]
    for line, rest in zip(kept, words):
        if SUBJECT not in line:
            raise ValueError(f"--prompts {path}: {line!r} lacks {SUBJECT}, the name of the subject")
        if not rest:
            raise ValueError(f"--prompts {path}: {line!r} says nothing beside {SUBJECT}")
    starts = 0, counts[0], counts[0] + counts[1]
    if twice := [p for i, p in enumerate(kept) if words[i] in words[:i]]:
        raise ValueError(f"--prompts {path}: {twice[0]!r} stands there twice; a prompt serves for one purpose")
    if len(kept) <= starts[2]:
        raise ValueError(
            f"--prompts {path}: {len(kept)} prompts; {counts[0]} train, {counts[1]} validate, the next test"
        )
    ends = starts[1], starts[2], starts[2] + counts[2]
    return [[Placed(p) for p in kept[a:b]] for a, b in zip(starts, ends)]


def load_subject(references: str, class_name: str, index: int) -> tuple[Subject, list[str]]:
    """The subject that a command line names, and a line for each of its pictures that was skipped."""
    if references:
        if index:
            raise ValueError("--subject: numbers the toy subjects; --references brings its own")
        return photo_subject(references, class_name)
    if class_name:
        raise ValueError("--class-name: belongs to the pictures of --references; toy subjects know theirs")
    return toy_subject(SUBJECT_WORLD, index), []


def load_prompts(
    subject: Subject, references: str, live: bool, prompts: str, counts: tuple[int, int, int], seed: int
) -> list[list[Placed]]:
    """So many training, validation and test prompts of a subject (of a file's, as many as are left to test).

    Toy prompts depend on subject and seed. How long one list is changes none of the others.
    """
    if subject.thing is not None:
        if prompts or live:
            raise ValueError(f"{'--prompts' if prompts else '--live'}: belongs to the pictures of --references")
        try:
            every = toy_prompts(subject, seed, 3 * max(counts))
        except ValueError as e:
            raise ValueError(f"--train-prompts, --val-prompts, --test-prompts {max(counts)}: {e} (three lists)") from e
        return [every[i::3][:n] for i, n in enumerate(counts)]
    if prompts:
        if live:
            raise ValueError("--live: chooses among DreamBench's prompts; --prompts brings its own")
        return own_prompts(prompts, counts)
    lists = photo_prompts(subject, references, live)
    for name, found, n in zip(("train", "val", "test"), lists, counts):
        if n > len(found):
            raise ValueError(f"--{name}-prompts {n}: there are {len(found)}; list your own by --prompts FILE")
    return [found[:n] for found, n in zip(lists, counts)]
