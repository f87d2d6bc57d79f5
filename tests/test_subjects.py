"""Subjects, the prompts that place them, and the true measures of where they were placed."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minipref.data import recognise
from minipref.data import scenes as S
from minipref.data import subjects as J
from minipref.data.recognise import placed_as_asked
from minipref.data.subjects import toy_prompts, toy_subject
from minipref.models import tokenizer
from minipref.presets import small_tokenizer

SUBJECTS = [toy_subject(0, i) for i in range(14)]
PLACE = (10.0, 10.0), (24.0, 24.0)  # room for a large thing and a small one


def put(thing, x, y):
    return replace(thing, x=x, y=y)


def scene_of(subject, asked, size="large"):
    """A true scene that a prompt asks for."""
    thing = replace(subject.thing, size=size, radius=S.RADII[size])
    taken = {thing.colour, thing.second} | ({asked.second.colour} if asked.second else set())
    background = asked.background or next(c for c in S.COLOURS if c not in taken)
    second = [put(asked.second, *PLACE[1])] if asked.second else []
    return S.Scene(background, (put(thing, *PLACE[0]), *second))


def test_there_are_many_subjects_and_each_is_one_thing_on_several_backgrounds():
    assert len({(s.thing.shape, s.thing.colour, s.thing.second, s.thing.pattern) for s in SUBJECTS}) >= 12
    for s in SUBJECTS:
        assert 4 <= len(s.references) <= 6 and s.thing.pattern != "plain" and s.thing.colour != s.thing.second
        corners = {tuple(x[:, 0, 0].tolist()) for x in s.references}
        assert len(corners) == len(s.references)  # a corner shows the background
        sizes = [max(found, key=lambda f: f.overlap).radius for found in recognise.things(s.references)]
        assert min(sizes) < 0.8 * max(sizes)  # large and small
    assert torch.equal(toy_subject(0, 3).references, SUBJECTS[3].references)
    assert not torch.equal(toy_subject(1, 3).references, SUBJECTS[3].references)


def test_the_subjects_name_is_one_token_that_no_word_has():
    known = small_tokenizer()
    assert J.SUBJECT == tokenizer.SUBJECT and not known.unknown(f"a {J.SUBJECT} star")
    plain, named = known([f"a star {w}" for w in ("star", J.SUBJECT)]).tolist()
    assert sum(p != n for p, n in zip(plain, named)) == 1


def test_prompts_name_the_class_and_never_what_makes_the_subject_itself():
    known = small_tokenizer()
    for s in SUBJECTS[:7]:
        asked = toy_prompts(s, 0, 40)
        assert len({p.text for p in asked}) == 40
        for p in asked:
            assert p.text.startswith(f"a [V] {s.class_name}") and not known.unknown(p.text)
            assert p.background not in (s.thing.colour, s.thing.second)
            before = p.text.partition(" and ")[0].partition(" on ")[0]
            assert before == f"a [V] {s.class_name}"
            assert p.second is None or p.second.shape != s.class_name
        kinds = {(p.background is None, p.second is None) for p in asked}
        assert kinds == {(False, True), (True, False), (False, False)}
    with pytest.raises(ValueError, match="a toy subject has 306 prompts, not 1000"):
        toy_prompts(SUBJECTS[0], 0, 1000)


def test_the_true_measures_pass_true_pictures_and_name_what_is_missing():
    """Over 14 subjects and 6 prompts each; a picture of another subject, background or second thing fails its part."""
    right, wrong = [], {"subject": [], "background": [], "second": [], "second's colour": [], "second's shape": []}
    for i, s in enumerate(SUBJECTS):
        for k, asked in enumerate(toy_prompts(s, 0, 6)):
            true = scene_of(s, asked, ("large", "small")[k % 2])
            other = put(SUBJECTS[(i + 7) % 14].thing, *PLACE[0])  # the same shape in other colours or another pattern
            background = next(c for c in S.COLOURS if c not in {true.background, s.thing.colour, s.thing.second})
            pictures = S.draw(
                [true, replace(true, things=(other, *true.things[1:])), replace(true, background=background)]
                + [replace(true, things=true.things[:1])]
            )
            found = placed_as_asked(pictures, s.thing, [asked] * 4)
            if asked.second:  # another one beside the subject
                first, second = true.things
                free = [c for c in S.COLOURS if c not in {true.background, second.colour, first.colour, first.second}]
                shape = next(v for v in S.SHAPES if v not in (first.shape, second.shape))
                others = replace(second, colour=free[0], second=free[0]), replace(second, shape=shape)
                shown = S.draw([replace(true, things=(first, o)) for o in others])
                passed = placed_as_asked(shown, s.thing, [asked] * 2)["second"].tolist()
                wrong["second's colour"].append(passed[0])
                wrong["second's shape"].append(passed[1])
            right.append([bool(found[n][0]) for n in ("subject", "background", "second", "all")])
            wrong["subject"].append(bool(found["subject"][1]))
            if asked.background:
                wrong["background"].append(bool(found["background"][2]))
            if asked.second:
                wrong["second"].append(bool(found["second"][3]))
            for n in range(4):
                parts = [found[p][n] for p in ("subject", "background", "second")]
                assert bool(found["all"][n]) == all(parts)
    assert np.mean(right, axis=0).min() >= 0.95
    assert all(np.mean(v) <= 0.02 for v in wrong.values()), {k: np.mean(v) for k, v in wrong.items()}


@pytest.mark.parametrize("size", ["large", "small"])
def test_the_pattern_and_its_colours_in_their_order_make_the_subject(size):
    """The same shape in the same two colours with each other pattern, or with the colours swapped: at most 2 % of the
    pictures of 28 subjects pass, on a background that has neither colour."""
    passed, tried = 0, 0
    for s in [toy_subject(w, i) for w in (0, 1) for i in range(14)]:
        t = replace(s.thing, size=size, radius=S.RADII[size], x=16.0, y=16.0)
        others = [replace(t, pattern=p) for p in S.PATTERNS[1:] if p != t.pattern]
        others.append(replace(t, colour=t.second, second=t.colour))
        background = next(c for c in S.COLOURS if c not in (t.colour, t.second))
        images = S.draw([S.Scene(background, (o,)) for o in (t, *others)])
        found = placed_as_asked(images, s.thing, [J.Placed("")] * len(images))["subject"]
        assert found[0], s.name
        passed, tried = passed + int(found[1:].sum()), tried + len(others)
    assert passed <= 0.02 * tried, f"{passed} of {tried}"


def test_prompts_depend_on_subject_and_seed_alone():
    """How long one list is changes none of the others."""

    def asked(subject, seed, counts):
        return [[p.text for p in part] for part in J.load_prompts(subject, "", False, "", counts, seed)]

    base = asked(SUBJECTS[1], 0, (8, 8, 25))
    assert list(map(len, base)) == [8, 8, 25]
    for counts in ((4, 16, 25), (8, 8, 3), (1, 1, 1), (16, 4, 40)):
        again = asked(SUBJECTS[1], 0, counts)
        assert all(a[: len(b)] == b[: len(a)] for a, b in zip(again, base))
    assert base != asked(SUBJECTS[1], 1, (8, 8, 25))
    same_class = toy_subject(0, 8)  # 8 = 1 + 7 shapes
    assert same_class.class_name == SUBJECTS[1].class_name and base != asked(same_class, 0, (8, 8, 25))
    train, validate, test = J.load_prompts(SUBJECTS[1], "", False, "", (8, 8, 25), 0)
    assert len({p.text for p in train + validate + test}) == 41


def test_the_subject_twice_is_not_the_subject():
    for s in SUBJECTS:
        small = replace(s.thing, size="small", radius=S.RADII["small"])
        left, right = (put(small, *place) for place in PLACE)
        background = next(c for c in S.COLOURS if c not in (s.thing.colour, s.thing.second))
        once, twice = S.Scene(background, (left,)), S.Scene(background, (left, right))
        assert placed_as_asked(S.draw([once, twice]), s.thing, [J.Placed("")] * 2)["all"].tolist() == [True, False]


def test_the_class_alone_is_not_the_subject():
    """A plain thing of the subject's shape and first colour, as a model draws that knows the class only."""
    for s in SUBJECTS:
        plain = replace(s.thing, pattern="plain", second=s.thing.colour)
        asked = toy_prompts(s, 0, 2)[1]  # on a background
        picture = S.draw([scene_of(replace(s, thing=plain), asked)])
        assert not placed_as_asked(picture, s.thing, [asked])["subject"].any()


# ------------------------------------------------------------------------------------------------ photos


def photos(folder, count=3):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i:02d}.jpg")
    return folder


BENCH = """Classes

subject_name,class
my_dog,dog

Prompts

Object Prompts
prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
]

Live Subject Prompts
prompt_list = [
'a {0} {1} wearing a hat'.format(unique_token, class_token),
'a wet {0} {1}'.format(unique_token, class_token)
]
"""


def test_dreambench_gives_class_and_test_prompts(tmp_path):
    """A dog is alive without being told so; of any other class --live is believed."""
    folder = photos(tmp_path / "my_dog")
    (tmp_path / "prompts_and_classes.txt").write_text("\ufeff" + BENCH, encoding="utf-8")
    subject, skipped = J.photo_subject(folder, "")
    assert (subject.name, subject.class_name, tuple(subject.references.shape)) == ("my_dog", "dog", (3, 3, 32, 32))
    assert subject.thing is None and skipped == []
    other = J.photo_subject(photos(tmp_path / "mine"), "can")[0]
    alive = ["a [V] {} wearing a hat", "a wet [V] {}"]
    for s, live, test in (
        (subject, False, alive), (subject, True, alive),
        (other, True, alive), (other, False, ["a [V] {} in the jungle"]),
    ):  # fmt: skip
        train, validate, asked = J.photo_prompts(s, folder, live)
        assert [p.text for p in asked] == [p.format(s.class_name) for p in test] and len(train) == len(validate) == 8
        assert all(f"[V] {s.class_name}" in p.text for p in train + validate)
        assert {p.text for p in train}.isdisjoint(p.text for p in validate + asked)
        assert (f"a [V] {s.class_name} is swimming in a pool" in {p.text for p in train}) == (test == alive)
    assert J.dreambench_class(tmp_path / "prompts_and_classes.txt", "my_do") == ""  # the whole name counts


@pytest.mark.parametrize("line", ["a {0} old {1} in the jungle", "a {0} {1} beside a {0} {1}", "a dog"])
def test_a_line_of_dreambench_that_names_the_subject_otherwise_is_refused(tmp_path, line):
    path = tmp_path / "prompts_and_classes.txt"
    path.write_text(BENCH.replace("a {0} {1} in the jungle", line))
    with pytest.raises(ValueError, match=re.escape("should hold '{0} {1}', token and class, once")):
        J.dreambench_prompts(path, False)
    assert len(J.dreambench_prompts(path, True)) == 2


def test_prompts_of_your_own_train_validate_and_test_in_turn(tmp_path):
    folder, path = photos(tmp_path / "cup"), tmp_path / "prompts.txt"
    path.write_text("".join(f"a [V] cup {w}\n\n" for w in "abcde"), encoding="utf-8")
    subject, _ = J.load_subject(str(folder), "cup", 0)
    lists = J.load_prompts(subject, str(folder), False, str(path), (2, 1, 9), 0)
    assert [[p.text[-1] for p in part] for part in lists] == [["a", "b"], ["c"], ["d", "e"]]


@pytest.mark.parametrize(
    "files,class_name,prompts,said",
    [
        (0, "cup", "", "no readable picture"),
        (1, "cup", "", "single readable picture"),
        (3, "", "", "--class-name"),
        (3, "cup", "a [V] cup on a mat\na cup on a table\n", "'a cup on a table' lacks [V]"),
        (3, " ", "", "--class-name"),
        (3, "[V] cup", "", "--class-name, a word or two such as dog"),
        (3, "??", "", "--class-name, a word or two such as dog"),
        (3, "cup", "a [V] cup\nA  [V] cup.\n", "'A  [V] cup.' stands there twice"),
        (3, "cup", "a [V] cup\n[V]\n", "'[V]' says nothing beside [V]"),
        (3, "cup", "a [V] cup on a mat\n", "1 prompts; 8 train, 8 validate, the next test"),
    ],
)
def test_bad_subjects_are_refused_in_one_line(tmp_path, files, class_name, prompts, said):
    folder, path = photos(tmp_path / "x", files), tmp_path / "prompts.txt"
    path.write_text(prompts)
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        subject, _ = J.load_subject(str(folder), class_name, 0)
        J.load_prompts(subject, str(folder), False, str(path) if prompts else "", (8, 8, 8), 0)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_reference_that_is_no_picture_is_named_and_skipped(tmp_path):
    folder = photos(tmp_path / "cup")
    (folder / "03.jpg").write_text("no picture")
    subject, skipped = J.photo_subject(folder, "cup")
    assert len(subject.references) == 3 and len(skipped) == 1 and "03.jpg" in skipped[0]


def test_more_prompts_than_there_are_and_flags_of_the_other_kind_are_refused(tmp_path):
    folder = photos(tmp_path / "cup")
    subject, _ = J.load_subject(str(folder), "cup", 0)
    with pytest.raises(ValueError, match="--val-prompts 9: there are 8"):
        J.load_prompts(subject, str(folder), False, "", (8, 9, 8), 0)
    with pytest.raises(ValueError, match="--class-name"):
        J.load_subject("", "cup", 0)
    with pytest.raises(ValueError, match="--subject"):
        J.load_subject(str(folder), "cup", 3)
    photos(tmp_path / "many" / "inner")
    Image.new("RGB", (32, 32)).save(tmp_path / "many" / "00.png")  # a file beside the sub-folder
    with pytest.raises(ValueError, match="sub-folders; name the folder of one subject"):
        J.load_subject(str(tmp_path / "many"), "cup", 0)
    with pytest.raises(ValueError, match="--test-prompts 200: a toy subject has 306 prompts, not 600"):
        J.load_prompts(SUBJECTS[0], "", False, "", (8, 8, 200), 0)
    with pytest.raises(ValueError, match="--live"):
        J.load_prompts(SUBJECTS[0], "", True, "", (1, 1, 1), 0)
    with pytest.raises(FileNotFoundError):
        J.load_subject(str(Path(tmp_path) / "nowhere"), "cup", 0)
