"""The toy's true measure: it must find in true scenes what they hold, and in others what they lack."""

from dataclasses import replace

import pytest
import torch

from minipref.data.prompts import prompt_seed
from minipref.toy import judge, world


def pictures(*all_things, background="white"):
    scenes = [world.Scene(background, tuple(things)) for things in all_things]
    return world.draw(scenes), scenes


def thing(shape="circle", colour="red", second=None, pattern="plain", x=12.0, y=14.0, radius=8.0):
    return world.Thing(shape, colour, pattern, second or colour, "large", x, y, radius)


@pytest.mark.parametrize("radius", [6.0, 7.0, 10.0])
@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_shape_is_found_with_its_place_and_size(shape, radius):
    images, _ = pictures([thing(shape, radius=radius)])
    ((found,),) = judge.things(images)
    assert found.shape == shape and found.overlap >= 0.75 and found.overlap > found.runner_up
    assert abs(found.x - 12) <= 1 and abs(found.y - 14) <= 1 and abs(found.radius - radius) <= 1
    assert found.colours["red"] >= 0.6


@pytest.mark.slow
def test_true_scenes_obey_themselves_and_strangers_do_not():
    """400 random scenes: at least 99 % pass whole; each against its neighbour's picture: at most 2 %."""
    scenes = world.scenes(prompt_seed("held out", 77), 0, 400)
    images = world.draw(scenes)
    own, other = judge.obeyed(images, scenes), judge.obeyed(images.roll(1, 0), scenes)
    assert own["background"].all() and own["shape"].double().mean() >= 0.99
    assert own["all"].double().mean() >= 0.99 and other["all"].double().mean() <= 0.02
    assert other["background"].double().mean() < 0.25 and other["shape"].double().mean() < 0.3


def test_what_is_wrong_is_told_apart():
    two = [thing(radius=6.0, x=8.0, y=8.0), thing("square", "blue", radius=6.0, x=23.0, y=23.0)]
    images, (scene,) = pictures(two)
    assert all(v.all() for v in judge.obeyed(images, [scene]).values())

    def told(drawn, background="white"):
        return {k: bool(v) for k, v in judge.obeyed(pictures(drawn, background=background)[0], [scene]).items()}

    right = {"background": True, "shape": True, "colour": True, "second": True, "all": True}
    assert told(two[::-1]) == right  # wherever they stand
    assert told(two, "yellow") == right | {"background": False, "all": False}
    assert told(two[:1]) == right | {"second": False, "all": False}
    assert told([thing("star", radius=6.0, x=8.0, y=8.0), two[1]]) == right | {"shape": False, "all": False}
    assert told([thing("circle", "green", radius=6.0, x=8.0, y=8.0), two[1]]) == right | {"colour": False, "all": False}
    assert told([]) == {"background": True, "shape": False, "colour": False, "second": False, "all": False}


def test_both_colours_of_a_pattern_must_be_there():
    halved = thing("square", "red", "blue", "halved")
    _, (scene,) = pictures([halved])
    for drawn, expected in ((halved, True), (thing("square"), False), (thing("square", "blue"), False)):
        assert bool(judge.obeyed(pictures([drawn])[0], [scene])["colour"]) == expected


def test_what_is_not_asked_for_is_not_judged():
    images, _ = pictures([thing("square", "red", "blue", "halved")], background="green")
    for colour, second, background, wrong in (
        ("", "", "", None),
        ("red", "", "green", None),
        ("red", "red", "", "colour"),  # a plain red one: half of it is too little
        ("yellow", "", "", "colour"),
        ("", "", "yellow", "background"),
    ):
        asked = replace(thing("square"), colour=colour, second=second, size="", pattern="")
        told = judge.obeyed(images, [world.Scene(background, (asked,))])
        for name, value in told.items():
            assert bool(value) == (wrong is None or name not in (wrong, "all")), (colour, second, background, name)


def test_one_patch_stands_for_one_thing_only():
    twice = [thing(radius=6.0, x=8.0, y=8.0), thing(radius=6.0, x=23.0, y=23.0)]
    _, (scene,) = pictures(twice)
    assert not judge.obeyed(pictures(twice[:1])[0], [scene])["second"]


def test_blobs_and_noise_are_no_shapes():
    """A shape's left half is not that shape; noise is nothing."""
    images, (scene,) = pictures([thing("square", radius=9.0, x=14.0, y=14.0)])
    images[:, :, :, 13:] = 1
    assert not judge.obeyed(images, [scene])["shape"]
    noise = torch.rand(1, 3, 32, 32)
    assert not judge.obeyed(noise, [scene])["all"]


@pytest.mark.parametrize("missing,kept", [(0.15, True), (0.2, True), (0.24, False), (0.28, False)])
def test_three_quarters_of_a_shape_must_be_there(missing, kept):
    """A square with this share of its pixels missing here and there still looks like a square most of all."""
    images, (scene,) = pictures([thing("square", radius=9.0, x=16.0, y=16.0)])
    hidden = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) < missing
    images[:, :, hidden] = 1
    found = judge.things(images)[0][0]
    assert found.shape == "square" and abs(found.overlap - (1 - missing)) < 0.07
    assert bool(judge.obeyed(images, [scene])["shape"]) == kept


def test_most_of_a_thing_must_have_its_colours():
    """A red square with a part painted in a colour that nobody asked for: 60 % must be red."""
    images, (scene,) = pictures([thing("square", radius=8.0, x=14.0, y=14.0)])
    for columns, kept in ((6, True), (7, False)):  # of 16: 62 % and 56 % are left
        spoilt = images.clone()
        spoilt[:, :, 6:22, 6 : 6 + columns] = torch.from_numpy(world.RGB[world.COLOURS.index("green")])[:, None, None]
        assert bool(judge.obeyed(spoilt, [scene])["colour"]) == kept


def test_patches_are_connected_by_edges_and_specks_are_left_out():
    mask = torch.zeros(12, 12, dtype=torch.bool)
    mask[0:4, 0:4] = mask[4:8, 4:9] = True  # they meet at a corner only
    mask[10, 0:3] = True  # a speck
    found = judge.patches(mask)
    assert [int(p.sum()) for p in found] == [20, 16]
    assert judge.patches(torch.zeros(5, 5, dtype=torch.bool)) == []
