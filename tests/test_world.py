"""The toy world: scenes, captions, masks and prompts."""

import re

import numpy as np
import pytest
import torch

from minipref.data import masks as M
from minipref.data.prompts import PURPOSES, Prompts, picture_prompts, prompt_seed, text_prompts
from minipref.toy import world
from minipref.toy.subjects import toy_subject
from minipref.toy.world import prompt_source, scene_prompts, shown_scene

RGB = torch.from_numpy(world.RGB)


# ------------------------------------------------------------------------------------------------ scenes


def test_a_scene_is_a_function_of_its_seed_and_number():
    assert world.scenes(3, 10, 5) == [world.scene(3, i) for i in range(10, 15)]
    assert torch.equal(world.draw(world.scenes(3, 10, 5)), world.draw(world.scenes(3, 10, 5)))
    assert len({world.scene(s, i) for s in range(10) for i in range(10)}) > 90  # a finite world: some scenes recur


def test_worlds_never_meet():
    """A million and three apart, numbered from 1: rating files and shipped weights of earlier versions name them."""
    seeds = {prompt_seed(p, s) for p in PURPOSES for s in (0, 1, 999_999)}
    with pytest.raises(ValueError, match="choose 0 to 999999"):
        prompt_seed("rating", 2_000_006)
    assert len(seeds) == 15 and max(prompt_seed("train", s) for s in (0, 999_999)) < prompt_seed("clip", 0)
    assert [prompt_seed(p, 7) for p in ("train", "clip", "rating", "rl", "held out")] == [
        1_000_010, 2_000_013, 3_000_016, 4_000_019, 5_000_022,
    ]  # fmt: skip


def test_about_a_third_of_the_scenes_has_a_second_thing_apart_from_the_first():
    """4,000 scenes; six standard errors of a share of 0.35: ±0.045, false alarm 2e-9."""
    scenes = world.scenes(0, 0, 4000)
    share = np.mean([len(s.things) == 2 for s in scenes])
    assert abs(share - world.SECOND_OBJECT_SHARE) < 0.045
    for s in scenes:
        for t in s.things:
            assert s.background not in (t.colour, t.second) and (t.colour == t.second) == (t.pattern == "plain")
            assert t.radius <= t.x <= world.SIZE - t.radius and t.radius <= t.y <= world.SIZE - t.radius
            assert t.x % world.GRID == 0 and t.y % world.GRID == 0 and t.radius == world.RADII[t.size]
        if len(s.things) == 2:
            a, b = s.things
            assert b.x - a.x > a.radius + b.radius + 2  # named from left to right, with a gap between
            assert a.size == b.size == "small" and b.pattern == "plain"
    firsts = [s.things[0].pattern for s in scenes if len(s.things) == 2]
    plain = np.mean([p == "plain" for p in firsts])
    assert abs(plain - world.PLAIN_SHARE) < 0.08  # six standard errors of 0.45, n > 1,200


def thing(**changes):
    given = {"shape": "square", "colour": "red", "pattern": "plain", "second": "red", "size": "large"}
    return world.Thing(**{**given, "x": 16.0, "y": 12.0, "radius": 8.0, **changes})


def test_a_drawing_has_its_colours_where_the_scene_says():
    x = world.draw([world.Scene("blue", (thing(),))])[0]
    assert x.shape == (3, 32, 32) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    red, blue = (RGB[world.COLOURS.index(c)] for c in ("red", "blue"))
    for y, column, colour in ((12, 16, red), (6, 10, red), (12, 26, blue), (28, 16, blue), (0, 0, blue)):
        assert torch.allclose(x[:, y, column], colour, atol=1e-6), (y, column)


@pytest.mark.parametrize(
    "pattern,at_first,at_second",
    [
        ("striped", [(12, 14), (8, 17)], [(12, 18), (8, 13)]),
        ("banded", [(10, 16), (13, 11)], [(14, 16), (9, 11)]),
        ("dotted", [(12, 18), (14, 16), (14, 18)], [(12, 16), (13, 17), (12, 20), (12, 13)]),
        ("halved", [(12, 13), (8, 10)], [(12, 19), (8, 21)]),
    ],
)
def test_patterns_alternate_in_their_direction(pattern, at_first, at_second):
    x = world.draw([world.Scene("blue", (thing(pattern=pattern, second="white"),))])[0]
    for spots, colour in ((at_first, "red"), (at_second, "white")):
        for y, column in spots:
            nearest = (x[:, y, column][None] - RGB).norm(dim=1).argmin()
            assert world.COLOURS[nearest] == colour, (y, column)


@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_shape_keeps_to_its_radius_and_differs_from_the_others(shape):
    stamps = {s: world.stamp(s, "plain", 9.0) > 0 for s in world.SHAPES}
    mine, n = stamps[shape], stamps[shape].shape[0] // 2
    y, x = np.nonzero(mine)
    assert np.maximum(abs(x - n + 0.5), abs(y - n + 0.5)).max() <= 9.0 * world.OVERSAMPLE * 1.05
    for other, theirs in stamps.items():
        overlap = (mine & theirs).sum() / (mine | theirs).sum()
        assert other == shape or overlap < 0.85, other


def test_the_layout_says_which_thing_covers_a_pixel():
    s = world.Scene(
        "blue", (thing(x=9.0, y=9.0), thing(shape="circle", colour="white", second="white", x=24.0, y=24.0, radius=5.0))
    )
    lay = world.layout([s])[0]
    assert lay.dtype == torch.int64 and lay[9, 9] == 1 and lay[24, 24] == 2 and lay[9, 24] == 0 and lay[31, 0] == 0


def test_a_sloppy_picture_is_washed_out_and_hatched():
    x = torch.full((1, 3, 8, 8), 0.8)
    y = world.sloppy(x)
    values = sorted(set(np.round(y.flatten().tolist(), 5)))
    assert values == pytest.approx([0.55 * 0.8, 0.55 * 0.8 + 0.22])
    assert torch.equal(y[0, 0, 0], y[0, 0, 1].roll(1)) and not torch.equal(y[0, 0, 0], y[0, 0, 2])  # diagonals


def test_captions_name_each_attribute_only_part_of_the_time():
    star = thing(shape="star", colour="green", second="green", x=27.0, y=27.0, radius=4.5, size="small")
    s = world.Scene("blue", (thing(pattern="striped", second="white"), star))
    full = world.caption(s)
    assert full == "a large red and white striped square and a small green plain star on a blue background"
    rng = np.random.default_rng(0)
    texts = [world.caption(s, rng) for _ in range(2000)]
    for word in (
        "large",
        "red",
        "white",
        "striped",
        "star",
        "blue",
    ):  # 6 standard errors of 0.7² … 0.7: false alarm 1e-8
        share = np.mean([word in t.split() for t in texts])
        assert 0.40 < share < 0.77, word
    assert all("square" in t for t in texts)
    assert "clean picture of" in world.caption(s, rng, "clean")


def test_what_a_caption_says_is_told_apart_from_what_it_leaves_out():
    """Read from the words alone: background, first thing, second thing, each with the attributes that are named."""
    rng, seen = np.random.default_rng(3), set()
    for s in world.scenes(1, 0, 400):
        text, said = world.describe(s, rng)
        head, _, behind = text.partition(" on ")
        assert said.background == (behind.split()[1] if behind else "")
        phrases = re.split(r" and (?=an? )", head)
        assert len(phrases) == len(said.things) <= len(s.things)
        for phrase, thing, true in zip(phrases, said.things, s.things):
            words = phrase.split()[1:]
            colours = [w for w in words if w in world.COLOURS]
            assert words[-1] == thing.shape == true.shape
            assert thing.size == next((w for w in words if w in world.RADII), "")
            assert thing.pattern == next((w for w in words if w in world.PATTERNS), "")
            if true.pattern == "plain":
                assert [thing.colour, thing.second] == (colours * 2 or ["", ""])
            else:
                assert [thing.colour, thing.second] == (colours + ["", ""])[:2]
            seen |= {(true.pattern == "plain", len(colours), bool(thing.size), bool(thing.pattern))}
        assert world.describe(s)[1] == s
    assert len(seen) == 2 * 4 + 3 * 4  # every way of naming occurs


def test_every_caption_is_made_of_known_words():
    rng = np.random.default_rng(0)
    for s in world.scenes(1, 0, 500):
        for text in (world.caption(s), world.caption(s, rng, "sloppy")):
            assert set(text.split()) <= set(world.WORDS), text
        assert len(world.caption(s).split()) <= 22  # begin and end fit into 24 tokens


# ------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("size", [32, 64])
def test_prefpaints_masks_have_the_sizes_of_the_paper(size):
    rng = np.random.default_rng(0)
    for _ in range(300):
        known = 1 - M.visible_square(rng, size)
        rows, columns = known.any(1).sum(), known.any(0).sum()
        assert rows == columns and known.sum() == rows * columns
        slack = 2 * 0.5 / size  # rounding of the side
        assert 0.15**0.5 - slack <= rows / size <= 0.25**0.5 + slack
        known = 1 - M.visible_strip(rng, size)
        assert known.all(0).sum() * size == known.sum()
        assert 0.35 - slack <= known.all(0).sum() / size <= 0.40 + slack


@pytest.mark.parametrize("kind", M.KINDS)
def test_masks_are_zero_or_one_and_leave_a_hole(kind):
    rng = np.random.default_rng(0)
    for _ in range(50):
        m = M.KINDS[kind](rng, 32)
        assert m.shape == (32, 32) and m.dtype == np.float32 and set(np.unique(m)) <= {0, 1} and m.any()
        assert m.all() == (kind == "full")


def test_a_moved_camera_uncovers_the_side_it_turns_to():
    """Holes of the eight views: some are wide, none swallows the picture, and they differ."""
    rng = np.random.default_rng(0)
    shares = [M.warp(rng, 32).mean() for _ in range(100)]
    assert 0.02 < np.mean(shares) < 0.4 and max(shares) < 0.6 and np.std(shares) > 0.01


def test_mask_kinds_come_in_the_shares_asked_for():
    masks, kinds = M.random_masks(np.random.default_rng(0), 1000, 32, {"square": 3.0, "full": 1.0})
    assert masks.shape == (1000, 1, 32, 32) and set(kinds) == {"square", "full"}
    assert abs(kinds.count("square") / 1000 - 0.75) < 6 * (0.75 * 0.25 / 1000) ** 0.5  # false alarm 2e-9
    assert all(bool(m.all()) == (k == "full") for m, k in zip(masks, kinds))
    with pytest.raises(ValueError, match="unknown mask kind"):
        M.random_masks(np.random.default_rng(0), 2, 32, {"circle": 1.0})


def test_known_pixels_survive_bit_for_bit():
    prompts = scene_prompts(0, 0, 8)
    images = prompts.images + 1e-7  # values that arithmetic would round
    generated = torch.rand(8, 3, 32, 32)
    prompts = Prompts(images, prompts.masks, prompts.texts, prompts.kinds)
    out, known = prompts.paste_known(generated), (prompts.masks < 0.5).expand_as(images)
    assert torch.equal(out[known], images[known]) and torch.equal(out[~known], generated[~known])
    hidden = prompts.masked
    assert torch.equal(hidden[known], images[known]) and (hidden[~known] == 0.5).all()


def test_prompts_are_numbered_and_can_be_selected_and_repeated():
    prompts = scene_prompts(4, 0, 6)
    later = scene_prompts(4, 3, 3)
    assert torch.equal(prompts.images[3:], later.images) and torch.equal(prompts.masks[3:], later.masks)
    twice = prompts.select([2, 0]).repeat_each(2)
    assert torch.equal(twice.images, prompts.images[[2, 2, 0, 0]]) and twice.truth == [
        prompts.truth[i] for i in (2, 2, 0, 0)
    ]
    assert prompts.texts == [""] * 6 and set(prompts.kinds) <= set(M.OUTPAINTING)
    own = picture_prompts(torch.rand(2, 3, 32, 32), 0, 0, 5)
    assert (
        torch.equal(own.images[0], own.images[4]) and not torch.equal(own.masks[0], own.masks[2]) and own.truth is None
    )
    with pytest.raises(ValueError, match="Prompts"):
        Prompts(prompts.images, prompts.masks[:3], prompts.texts, prompts.kinds)


def test_texts_alone_are_prompts_without_pictures():
    prompts = text_prompts(["a red circle", "a blue star", "a ring"])
    some = prompts.select([2, 0]).repeat_each(2)
    assert len(prompts) == 3 and some.texts == ["a ring"] * 2 + ["a red circle"] * 2 and some.kinds == ["full"] * 4
    assert some.images is some.masks is some.truth is None
    generated = torch.rand(4, 3, 8, 8)
    assert torch.equal(some.paste_known(generated), generated)  # nothing is known
    with pytest.raises(ValueError, match="Prompts"):  # a picture without its mask
        Prompts(generated, None, some.texts, some.kinds)


def test_a_purpose_has_prompts_of_its_own_world():
    for purpose, seed in (("rl", 3), ("held out", 0)):
        own = prompt_source(purpose, seed, 32)(5, 2)
        assert own.truth == [world.scene(prompt_seed(purpose, seed), i) for i in (5, 6)]
        same = scene_prompts(prompt_seed(purpose, seed), 5, 2)
        assert torch.equal(own.images, same.images) and torch.equal(own.masks, same.masks) and own.kinds == same.kinds


@pytest.mark.parametrize(
    "ask", [lambda n: scene_prompts(0, 0, 2, n), lambda n: prompt_source("rl", 0, n), lambda n: toy_subject(0, n)]
)
def test_the_toy_world_is_refused_to_a_model_of_another_size(ask):
    """In one line, before anything is drawn."""
    for size in (16, 31, 64):
        with pytest.raises(
            ValueError, match=f"^the toy world has pictures of 32 pixels and this model has {size}: .+$"
        ):
            ask(size)
    ask(32)


def test_a_place_is_the_scene_of_a_masked_picture_only_where_it_shows_its_known_pixels():
    prompts = scene_prompts(9, 0, 4)
    kept = (prompts.masked * 255).round() / 255  # as a PNG file keeps it
    for i in range(4):
        assert shown_scene((9, i), kept[i], prompts.masks[i]) == prompts.truth[i]
    for place in ((9, 1), (10, 0)):
        with pytest.raises(
            ValueError, match=rf"^scene \[{place[0]}, {place[1]}\] is not what its masked picture shows"
        ):
            shown_scene(place, kept[0], prompts.masks[0])
    spoilt, (y, x) = kept[0].clone(), (prompts.masks[0, 0] < 0.5).nonzero()[0]
    spoilt[1, y, x] += 0.02  # a single known pixel, five of 255 steps in one channel
    with pytest.raises(ValueError, match="is not what"):
        shown_scene((9, 0), spoilt, prompts.masks[0])
    hidden, (y, x) = kept[0].clone(), (prompts.masks[0, 0] > 0.5).nonzero()[0]
    hidden[:, y, x] = 0  # what the hole shows does not matter
    assert shown_scene((9, 0), hidden, prompts.masks[0]) == prompts.truth[0]
