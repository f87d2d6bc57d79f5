"""Subjects, the prompts that place them, and the true measures of where they were placed."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import train_rpo
from minipref.data import subjects
from minipref.data.subjects import SubjectPrompt
from minipref.models.tokenizer import SUBJECT, WordTokenizer
from minipref.toy import judge, world
from minipref.toy.judge import placed_as_prompted
from minipref.toy.subjects import Placement, prompt_lists, subject_prompts, toy_subject

SIZE = 32  # pixels of the toy world
SUBJECTS = [toy_subject(i, SIZE) for i in range(14)]
ANYWHERE = SubjectPrompt("", Placement())  # says nothing of background or company
PLACE = (10.0, 10.0), (24.0, 24.0)  # room for a large thing and a small one


def put(thing, x, y):
    return replace(thing, x=x, y=y)


def scene_of(subject, prompt, size="large"):
    """A true scene that a prompt asks for."""
    asked = prompt.truth
    thing = replace(subject.truth, size=size, radius=world.RADII[size])
    taken = {thing.colour, thing.second} | ({asked.second.colour} if asked.second else set())
    background = asked.background or next(c for c in world.COLOURS if c not in taken)
    second = [put(asked.second, *PLACE[1])] if asked.second else []
    return world.Scene(background, (put(thing, *PLACE[0]), *second))


def test_there_are_many_subjects_and_each_is_one_thing_on_several_backgrounds():
    assert len({(s.truth.shape, s.truth.colour, s.truth.second, s.truth.pattern) for s in SUBJECTS}) >= 12
    for s in SUBJECTS:
        assert 4 <= len(s.references) <= 6 and s.truth.pattern != "plain" and s.truth.colour != s.truth.second
        corners = {tuple(x[:, 0, 0].tolist()) for x in s.references}
        assert len(corners) == len(s.references)  # a corner shows the background
        sizes = [max(found, key=lambda f: f.overlap).radius for found in judge.things(s.references)]
        assert min(sizes) < 0.8 * max(sizes)  # large and small
    assert torch.equal(toy_subject(3, SIZE, seed=0).references, SUBJECTS[3].references)
    assert not torch.equal(toy_subject(3, SIZE, seed=1).references, SUBJECTS[3].references)


def test_the_subjects_name_is_one_token_that_no_word_has():
    known = WordTokenizer(world.WORDS)
    assert subjects.SUBJECT is SUBJECT == "[V]" and not known.unknown(f"a {SUBJECT} star")
    plain, named = known([f"a star {w}" for w in ("star", SUBJECT)]).tolist()
    assert sum(p != n for p, n in zip(plain, named)) == 1


def test_prompts_name_the_class_and_never_what_makes_the_subject_itself():
    known = WordTokenizer(world.WORDS)
    for s in SUBJECTS[:7]:
        prompts = subject_prompts(s, 0, 40)
        assert len({p.text for p in prompts}) == 40
        for text, asked in ((p.text, p.truth) for p in prompts):
            assert text.startswith(f"a [V] {s.class_name}") and not known.unknown(text)
            assert asked.background not in (s.truth.colour, s.truth.second)
            before = text.partition(" and ")[0].partition(" on ")[0]
            assert before == f"a [V] {s.class_name}"
            assert asked.second is None or asked.second.shape != s.class_name
            assert ("small" in text, "background" in text) == (asked.second is not None, asked.background is not None)
            assert asked.second is None or f" and a small {asked.second.colour} {asked.second.shape}" in text
            assert asked.background is None or text.endswith(f" {asked.background} background")
        kinds = {(p.truth.background is None, p.truth.second is None) for p in prompts}
        assert kinds == {(False, True), (True, False), (False, False)}
    with pytest.raises(ValueError, match="a toy subject has 306 prompts, not 1000"):
        subject_prompts(SUBJECTS[0], 0, 1000)


@pytest.mark.slow
def test_the_true_measures_pass_true_pictures_and_name_what_is_missing():
    """Over 14 subjects and 6 prompts each; a picture of another subject, background or second thing fails its part."""
    right, wrong = [], {"subject": [], "background": [], "second": [], "second's colour": [], "second's shape": []}
    for i, s in enumerate(SUBJECTS):
        for k, prompt in enumerate(subject_prompts(s, 0, 6)):
            asked, true = prompt.truth, scene_of(s, prompt, ("large", "small")[k % 2])
            other = put(SUBJECTS[(i + 7) % 14].truth, *PLACE[0])  # the same shape in other colours or another pattern
            background = next(c for c in world.COLOURS if c not in {true.background, s.truth.colour, s.truth.second})
            pictures = world.draw(
                [true, replace(true, things=(other, *true.things[1:])), replace(true, background=background)]
                + [replace(true, things=true.things[:1])]
            )
            found = placed_as_prompted(pictures, s.truth, [prompt] * 4)
            if asked.second:  # another one beside the subject
                first, second = true.things
                free = [
                    c for c in world.COLOURS if c not in {true.background, second.colour, first.colour, first.second}
                ]
                shape = next(v for v in world.SHAPES if v not in (first.shape, second.shape))
                others = replace(second, colour=free[0], second=free[0]), replace(second, shape=shape)
                shown = world.draw([replace(true, things=(first, o)) for o in others])
                passed = placed_as_prompted(shown, s.truth, [prompt] * 2)["second"].tolist()
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
    for s in [toy_subject(i, SIZE, seed=w) for w in (0, 1) for i in range(14)]:
        t = replace(s.truth, size=size, radius=world.RADII[size], x=16.0, y=16.0)
        others = [replace(t, pattern=p) for p in world.PATTERNS[1:] if p != t.pattern]
        others.append(replace(t, colour=t.second, second=t.colour))
        background = next(c for c in world.COLOURS if c not in (t.colour, t.second))
        images = world.draw([world.Scene(background, (o,)) for o in (t, *others)])
        found = placed_as_prompted(images, s.truth, [ANYWHERE] * len(images))["subject"]
        assert found[0], s.name
        passed, tried = passed + int(found[1:].sum()), tried + len(others)
    assert passed <= 0.02 * tried, f"{passed} of {tried}"


def test_prompts_depend_on_subject_and_seed_alone():
    """How long one list is changes none of the others."""

    def asked(subject, seed, counts):
        return [[p.text for p in part] for part in prompt_lists(subject, seed, counts)]

    base = asked(SUBJECTS[1], 0, (8, 8, 25))
    assert list(map(len, base)) == [8, 8, 25]
    for counts in ((4, 16, 25), (8, 8, 3), (1, 1, 1), (16, 4, 40)):
        again = asked(SUBJECTS[1], 0, counts)
        assert all(a[: len(b)] == b[: len(a)] for a, b in zip(again, base))
    assert base != asked(SUBJECTS[1], 1, (8, 8, 25))
    same_class = toy_subject(8, SIZE)  # 8 = 1 + 7 shapes
    assert same_class.class_name == SUBJECTS[1].class_name and base != asked(same_class, 0, (8, 8, 25))
    train, validate, test = prompt_lists(SUBJECTS[1], 0, (8, 8, 25))
    assert len({p.text for p in train + validate + test}) == 41


def test_the_subject_twice_is_not_the_subject():
    for s in SUBJECTS:
        small = replace(s.truth, size="small", radius=world.RADII["small"])
        left, right = (put(small, *place) for place in PLACE)
        background = next(c for c in world.COLOURS if c not in (s.truth.colour, s.truth.second))
        once, twice = world.Scene(background, (left,)), world.Scene(background, (left, right))
        assert placed_as_prompted(world.draw([once, twice]), s.truth, [ANYWHERE] * 2)["all"].tolist() == [True, False]


def test_the_class_alone_is_not_the_subject():
    """A plain thing of the subject's shape and first colour, as a model draws that knows the class only."""
    for s in SUBJECTS:
        plain = replace(s.truth, pattern="plain", second=s.truth.colour)
        prompt = subject_prompts(s, 0, 2)[1]  # on a background
        picture = world.draw([scene_of(replace(s, truth=plain), prompt)])
        assert not placed_as_prompted(picture, s.truth, [prompt])["subject"].any()


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
    subject, skipped = subjects.photo_subject(folder, "", SIZE)
    assert (subject.name, subject.class_name, tuple(subject.references.shape)) == ("my_dog", "dog", (3, 3, 32, 32))
    assert subject.truth is None and skipped == []
    other = subjects.photo_subject(photos(tmp_path / "mine"), "can", SIZE)[0]
    alive = ["a [V] {} wearing a hat", "a wet [V] {}"]
    for s, live, test in (
        (subject, False, alive), (subject, True, alive),
        (other, True, alive), (other, False, ["a [V] {} in the jungle"]),
    ):  # fmt: skip
        train, validate, asked = subjects.photo_prompts(s, folder, live)
        assert [p.text for p in asked] == [p.format(s.class_name) for p in test] and len(train) == len(validate) == 8
        assert all(f"[V] {s.class_name}" in p.text for p in train + validate)
        assert {p.text for p in train}.isdisjoint(p.text for p in validate + asked)
        assert (f"a [V] {s.class_name} is swimming in a pool" in {p.text for p in train}) == (test == alive)
    assert subjects.dreambench_class(tmp_path / "prompts_and_classes.txt", "my_do") == ""  # the whole name counts


@pytest.mark.parametrize("line", ["a {0} old {1} in the jungle", "a {0} {1} beside a {0} {1}", "a dog"])
def test_a_line_of_dreambench_that_names_the_subject_otherwise_is_refused(tmp_path, line):
    path = tmp_path / "prompts_and_classes.txt"
    path.write_text(BENCH.replace("a {0} {1} in the jungle", line))
    with pytest.raises(ValueError, match=re.escape("should hold '{0} {1}', token and class, once")):
        subjects.dreambench_prompts(path, False)
    assert len(subjects.dreambench_prompts(path, True)) == 2


def test_prompts_of_your_own_train_validate_and_test_in_turn(tmp_path):
    folder, path = photos(tmp_path / "cup"), tmp_path / "prompts.txt"
    path.write_text("".join(f"a [V] cup {w}\n\n" for w in "abcde"), encoding="utf-8")
    subject, _ = subjects.photo_subject(folder, "cup", SIZE)
    lists = subjects.load_prompts(subject, folder, False, str(path), (2, 1, 9))
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
        subject, _ = subjects.photo_subject(folder, class_name, SIZE)
        subjects.load_prompts(subject, folder, False, str(path) if prompts else "", (8, 8, 8))
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_reference_that_is_no_picture_is_named_and_skipped(tmp_path):
    folder = photos(tmp_path / "cup")
    (folder / "03.jpg").write_text("no picture")
    subject, skipped = subjects.photo_subject(folder, "cup", SIZE)
    assert len(subject.references) == 3 and len(skipped) == 1 and "03.jpg" in skipped[0]


def test_more_prompts_than_there_are_and_flags_of_the_other_kind_are_refused(tmp_path):
    folder = photos(tmp_path / "cup")
    subject, _ = subjects.photo_subject(folder, "cup", SIZE)
    with pytest.raises(ValueError, match="--val-prompts 9: there are 8; list your own by --prompt-file FILE"):
        subjects.load_prompts(subject, folder, False, "", (8, 9, 8))
    with pytest.raises(ValueError, match="--live: chooses among DreamBench's prompts; --prompt-file brings its own"):
        subjects.load_prompts(subject, folder, True, "prompts.txt", (1, 1, 1))
    photos(tmp_path / "many" / "inner")
    Image.new("RGB", (32, 32)).save(tmp_path / "many" / "00.png")  # a file beside the sub-folder
    with pytest.raises(ValueError, match="sub-folders; name the folder of one subject"):
        subjects.photo_subject(tmp_path / "many", "cup", SIZE)
    with pytest.raises(ValueError, match="--test-prompts 200: a toy subject has 306 prompts, not 600"):
        prompt_lists(SUBJECTS[0], 0, (8, 8, 200))
    with pytest.raises(FileNotFoundError):
        subjects.photo_subject(tmp_path / "nowhere", "cup", SIZE)


@pytest.mark.parametrize(
    "flags,said",
    [
        ({"class_name": "cup"}, "--class-name: belongs to the pictures of --references"),
        ({"prompt_file": "prompts.txt"}, "--prompt-file: belongs to the pictures of --references"),
        ({"live": True}, "--live: belongs to the pictures of --references"),
        ({"references": "cup", "subject": 3}, "--subject: numbers the toy subjects; --references brings its own"),
    ],
)
def test_flags_of_toy_subjects_and_of_pictures_exclude_each_other(flags, said):
    with pytest.raises(ValueError, match=said):
        train_rpo.check(train_rpo.RPOConfig(preset="small", **(train_rpo.PRESETS["small"] | flags)))


def test_the_command_line_names_a_toy_subject_or_a_folder(tmp_path):
    """Toy subjects are the same for every seed, their prompts are not; pictures are read at the pipeline's size."""
    small = replace(train_rpo.RPOConfig(), preset="small", subject=3, train_prompts=2, val_prompts=1, test_prompts=4)
    for seed in (0, 5):
        subject, lists = train_rpo.load_subject(replace(small, seed=seed), SIZE)
        assert torch.equal(subject.references, SUBJECTS[3].references) and subject.truth == SUBJECTS[3].truth
        assert lists == prompt_lists(SUBJECTS[3], seed, (2, 1, 4)) and list(map(len, lists)) == [2, 1, 4]
    own = replace(small, subject=0, references=str(photos(tmp_path / "cup")), class_name="cup")
    for size in (32, 24):
        subject, lists = train_rpo.load_subject(own, size)
        assert (subject.class_name, tuple(subject.references.shape)) == ("cup", (3, 3, size, size))
        assert list(map(len, lists)) == [2, 1, 4] and all(p.truth is None for part in lists for p in part)


def test_references_are_called_by_the_subjects_token_and_their_class():
    assert subjects.instance_prompt("dog") == "a photo of a [V] dog"
