"""Toy subjects for RPO: one thing whose pattern and colours no prompt names, "a [V] square"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data.subjects import Subject, SubjectPrompt
from ..models.tokenizer import SUBJECT
from .world import COLOURS, PATTERNS, RADII, SHAPES, Scene, Thing, check_size, draw, random_thing

REFERENCES = 4
SUBJECT_WORLD = 0  # toy subjects are the same for every seed of a run


@dataclass(frozen=True)
class Placement:
    """What a prompt asks for beside the subject; None where it says nothing."""

    background: str | None = None
    second: Thing | None = None  # its place does not matter


def toy_subject(index: int, size: int, *, seed: int = SUBJECT_WORLD, count: int = REFERENCES) -> Subject:
    """Subject number `index`: shape, two colours and a pattern; each reference has another background."""
    check_size(size)
    rng = np.random.default_rng([seed, index, 2])
    shape, pattern = SHAPES[index % len(SHAPES)], PATTERNS[1 + rng.integers(len(PATTERNS) - 1)]
    colour, second = (COLOURS[i] for i in rng.choice(len(COLOURS), 2, replace=False))
    free = [c for c in COLOURS if c not in (colour, second)]
    backgrounds = [free[i] for i in rng.choice(len(free), min(count, len(free)), replace=False)]
    scenes = []
    for k in range(count):
        scale = ("large", "small")[k % 2]
        spot = random_thing(rng, backgrounds[k % len(backgrounds)], scale)
        thing = Thing(shape, colour, pattern, second, scale, spot.x, spot.y, spot.radius)
        scenes.append(Scene(backgrounds[k % len(backgrounds)], (thing,)))
    name = f"{index:02d}: {colour} and {second} {pattern} {shape}"
    return Subject(name, shape, draw(scenes), scenes[0].things[0])


def subject_prompts(subject: Subject, seed: int, count: int) -> list[SubjectPrompt]:
    """`count` different prompts that place a toy subject: on a background, beside a small plain thing, mostly both.

    No prompt asks for a colour of the subject behind it, or for a second thing of its own shape.
    """
    thing = subject.truth
    taken = {thing.colour, thing.second}
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
    made: list[SubjectPrompt] = []
    while len(made) < count:
        turn = ("both", "on", "beside", "both", "both", "beside", "both", "both")[len(made) % 8]
        name = next(k for k in (turn, "both", "beside", "on") if piles[k])
        background, second = piles[name].pop()
        text = f"a {SUBJECT} {subject.class_name}"
        text += f" and a small {second.colour} {second.shape}" if second else ""
        text += f" on {'an' if background[0] in 'aeiou' else 'a'} {background} background" if background else ""
        made.append(SubjectPrompt(text, Placement(background, second)))
    return made


def prompt_lists(subject: Subject, seed: int, counts: tuple[int, int, int]) -> list[list[SubjectPrompt]]:
    """So many training, validation and test prompts; how long one list is changes none of the others."""
    try:
        every = subject_prompts(subject, seed, 3 * max(counts))
    except ValueError as e:
        raise ValueError(f"--train-prompts, --val-prompts, --test-prompts {max(counts)}: {e} (three lists)") from e
    return [every[i::3][:n] for i, n in enumerate(counts)]
