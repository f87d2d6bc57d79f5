"""The toy world: scenes, captions, masks, prompts, and the raters who know the truth."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minipref.data import annotator as A
from minipref.data import masks as M
from minipref.data import scenes as S
from minipref.data.prompts import Prompts, picture_prompts, scene_prompts

RGB = torch.from_numpy(S.RGB)


# ------------------------------------------------------------------------------------------------ scenes


def test_a_scene_is_a_function_of_its_seed_and_number():
    assert S.scenes(3, 10, 5) == [S.scene(3, i) for i in range(10, 15)]
    assert torch.equal(S.draw(S.scenes(3, 10, 5)), S.draw(S.scenes(3, 10, 5)))
    assert len({S.scene(s, i) for s in range(10) for i in range(10)}) > 90  # a finite world: some scenes recur


def test_worlds_never_meet():
    seeds = {S.world(p, s) for p in range(1, 6) for s in (0, 1, 999_999)}
    with pytest.raises(ValueError, match="choose 0 to 999999"):
        S.world(3, 2_000_006)
    assert len(seeds) == 15 and max(S.world(1, s) for s in (0, 999_999)) < S.world(2, 0)


def test_about_a_third_of_the_scenes_has_a_second_thing_apart_from_the_first():
    """4,000 scenes; six standard errors of a share of 0.35: ±0.045, false alarm 2e-9."""
    batch = S.scenes(0, 0, 4000)
    share = np.mean([len(s.things) == 2 for s in batch])
    assert abs(share - S.SECOND_OBJECT_SHARE) < 0.045
    for s in batch:
        for t in s.things:
            assert s.background not in (t.colour, t.second) and (t.colour == t.second) == (t.pattern == "plain")
            assert t.radius <= t.x <= S.SIZE - t.radius and t.radius <= t.y <= S.SIZE - t.radius
            assert t.x % S.GRID == 0 and t.y % S.GRID == 0 and t.radius == S.RADII[t.size]
        if len(s.things) == 2:
            a, b = s.things
            assert b.x - a.x > a.radius + b.radius + 2  # named from left to right, with a gap between
            assert a.size == b.size == "small" and b.pattern == "plain"
    firsts = [s.things[0].pattern for s in batch if len(s.things) == 2]
    assert abs(np.mean([p == "plain" for p in firsts]) - S.PLAIN_SHARE) < 0.08  # six standard errors of 0.45, n > 1,200


def thing(**changes):
    given = {"shape": "square", "colour": "red", "pattern": "plain", "second": "red", "size": "large"}
    return S.Thing(**{**given, "x": 16.0, "y": 12.0, "radius": 8.0, **changes})


def test_a_drawing_has_its_colours_where_the_scene_says():
    x = S.draw([S.Scene("blue", (thing(),))])[0]
    assert x.shape == (3, 32, 32) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    red, blue = (RGB[S.COLOURS.index(c)] for c in ("red", "blue"))
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
    x = S.draw([S.Scene("blue", (thing(pattern=pattern, second="white"),))])[0]
    for spots, colour in ((at_first, "red"), (at_second, "white")):
        for y, column in spots:
            nearest = (x[:, y, column][None] - RGB).norm(dim=1).argmin()
            assert S.COLOURS[nearest] == colour, (y, column)


@pytest.mark.parametrize("shape", S.SHAPES)
def test_every_shape_keeps_to_its_radius_and_differs_from_the_others(shape):
    stamps = {s: S.stamp(s, "plain", 9.0) > 0 for s in S.SHAPES}
    mine, n = stamps[shape], stamps[shape].shape[0] // 2
    y, x = np.nonzero(mine)
    assert np.maximum(abs(x - n + 0.5), abs(y - n + 0.5)).max() <= 9.0 * S.OVERSAMPLE * 1.05
    for other, theirs in stamps.items():
        overlap = (mine & theirs).sum() / (mine | theirs).sum()
        assert other == shape or overlap < 0.85, other


def test_the_layout_says_which_thing_covers_a_pixel():
    s = S.Scene(
        "blue", (thing(x=9.0, y=9.0), thing(shape="circle", colour="white", second="white", x=24.0, y=24.0, radius=5.0))
    )
    lay = S.layout([s])[0]
    assert lay.dtype == torch.int64 and lay[9, 9] == 1 and lay[24, 24] == 2 and lay[9, 24] == 0 and lay[31, 0] == 0


def test_a_sloppy_picture_is_washed_out_and_hatched():
    x = torch.full((1, 3, 8, 8), 0.8)
    y = S.sloppy(x)
    values = sorted(set(np.round(y.flatten().tolist(), 5)))
    assert values == pytest.approx([0.55 * 0.8, 0.55 * 0.8 + 0.22])
    assert torch.equal(y[0, 0, 0], y[0, 0, 1].roll(1)) and not torch.equal(y[0, 0, 0], y[0, 0, 2])  # diagonals


def test_captions_name_each_attribute_only_part_of_the_time():
    star = thing(shape="star", colour="green", second="green", x=27.0, y=27.0, radius=4.5, size="small")
    s = S.Scene("blue", (thing(pattern="striped", second="white"), star))
    full = S.caption(s)
    assert full == "a large red and white striped square and a small green plain star on a blue background"
    rng = np.random.default_rng(0)
    texts = [S.caption(s, rng) for _ in range(2000)]
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
    assert "clean picture of" in S.caption(s, rng, "clean")


def test_what_a_caption_says_is_told_apart_from_what_it_leaves_out():
    """Read from the words alone: background, first thing, second thing, each with the attributes that are named."""
    rng, seen = np.random.default_rng(3), set()
    for s in S.scenes(1, 0, 400):
        text, said = S.describe(s, rng)
        head, _, behind = text.partition(" on ")
        assert said.background == (behind.split()[1] if behind else "")
        phrases = re.split(r" and (?=an? )", head)
        assert len(phrases) == len(said.things) <= len(s.things)
        for phrase, thing, true in zip(phrases, said.things, s.things):
            words = phrase.split()[1:]
            colours = [w for w in words if w in S.COLOURS]
            assert words[-1] == thing.shape == true.shape
            assert thing.size == next((w for w in words if w in S.RADII), "")
            assert thing.pattern == next((w for w in words if w in S.PATTERNS), "")
            if true.pattern == "plain":
                assert [thing.colour, thing.second] == (colours * 2 or ["", ""])
            else:
                assert [thing.colour, thing.second] == (colours + ["", ""])[:2]
            seen |= {(true.pattern == "plain", len(colours), bool(thing.size), bool(thing.pattern))}
        assert S.describe(s)[1] == s
    assert len(seen) == 2 * 4 + 3 * 4  # every way of naming occurs


def test_every_caption_is_made_of_known_words():
    rng = np.random.default_rng(0)
    for s in S.scenes(1, 0, 500):
        for text in (S.caption(s), S.caption(s, rng, "sloppy")):
            assert set(text.split()) <= set(S.WORDS), text
        assert len(S.caption(s).split()) <= 22  # begin and end fit into 24 tokens


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
    batch = scene_prompts(0, 0, 8)
    images = batch.images + 1e-7  # values that arithmetic would round
    generated = torch.rand(8, 3, 32, 32)
    batch = Prompts(images, batch.masks, batch.texts, batch.kinds)
    out, known = batch.paste_known(generated), (batch.masks < 0.5).expand_as(images)
    assert torch.equal(out[known], images[known]) and torch.equal(out[~known], generated[~known])
    hidden = batch.masked
    assert torch.equal(hidden[known], images[known]) and (hidden[~known] == 0.5).all()


def test_prompts_are_numbered_and_can_be_selected_and_repeated():
    batch = scene_prompts(4, 0, 6)
    later = scene_prompts(4, 3, 3)
    assert torch.equal(batch.images[3:], later.images) and torch.equal(batch.masks[3:], later.masks)
    twice = batch.select([2, 0]).repeat_each(2)
    assert torch.equal(twice.images, batch.images[[2, 2, 0, 0]]) and twice.scenes == [
        batch.scenes[i] for i in (2, 2, 0, 0)
    ]
    assert batch.texts == [""] * 6 and set(batch.kinds) <= set(M.OUTPAINTING)
    own = picture_prompts(torch.rand(2, 3, 32, 32), 0, 0, 5)
    assert (
        torch.equal(own.images[0], own.images[4]) and not torch.equal(own.masks[0], own.masks[2]) and own.scenes is None
    )
    with pytest.raises(ValueError, match="Prompts"):
        Prompts(batch.images, batch.masks[:3], batch.texts, batch.kinds)


# ------------------------------------------------------------------------------------------------ raters

COUNT = 400


@pytest.fixture(scope="module")
def fills():
    """Scenes with a thing that the hole cuts, and ways to fill the hole."""
    batch = scene_prompts(77, 0, 1500)
    lay, hole = S.layout(batch.scenes), batch.masks[:, 0] > 0.5
    cut = torch.zeros(len(batch), dtype=torch.bool)
    for i in (1, 2):
        body = lay == i
        area, seen = body.flatten(1).sum(1), (body & ~hole).flatten(1).sum(1)
        cut |= (seen > 0.3 * area) & (seen < 0.7 * area)
    batch = batch.select(cut.nonzero()[:COUNT, 0])
    lay, hole, x = S.layout(batch.scenes), batch.masks[:, 0] > 0.5, batch.images

    def rearranged(s, i):  # a plausible fill: what lies wholly in the hole is left out
        seen = [t for j, t in enumerate(s.things, 1) if ((lay[i] == j) & ~hole[i]).any()]
        return S.Scene(s.background, tuple(seen))

    clean = S.draw([rearranged(s, i) for i, s in enumerate(batch.scenes)])
    flat = torch.stack([RGB[S.COLOURS.index(s.background)] for s in batch.scenes])[:, :, None, None].expand_as(x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    ways = {
        "truth": x,
        "clean": clean,
        "sloppy": S.sloppy(clean),
        "flat background": flat,
        "flat grey": torch.full_like(x, 0.5),
        "blurred": F.avg_pool2d(F.pad(clean, (2, 2, 2, 2), mode="replicate"), 5, 1),
        "noisy": (clean + 0.15 * noise).clamp(0, 1),
        "pastel": 0.5 * clean + 0.5,
        "other colours": clean.roll(1, 1),
        "another scene": x.roll(1, 0),
    }
    return batch, {k: A.gold(batch.paste_known(v), batch.masks, batch.scenes).label for k, v in ways.items()}


def test_the_truth_beats_a_clean_fill_beats_a_sloppy_fill(fills):
    _, labels = fills
    assert len(labels["truth"]) == COUNT
    assert (labels["truth"] == 7).all() and (labels["clean"] <= 7).all() and labels["clean"].mean() < 7
    assert (labels["clean"] > labels["sloppy"] + 1).float().mean() > 0.99


@pytest.mark.parametrize(
    "way", ["flat background", "flat grey", "blurred", "noisy", "pastel", "other colours", "another scene"]
)
def test_bad_fills_fall_below_clean_ones(fills, way):
    _, labels = fills
    assert (labels[way] < labels["clean"]).float().mean() > 0.97
    assert labels["clean"].mean() - labels[way].mean() > 0.3


def test_gold_is_a_number_from_one_to_seven_whatever_the_scene():
    """Among 3,000 scenes are holes that show nothing but a thing's edge."""
    batch = scene_prompts(5, 0, 3000)
    assert (A.gold(batch.images, batch.masks, batch.scenes).label - 7).abs().max() < 1e-4
    for way in (torch.zeros_like(batch.images), torch.rand(batch.images.shape), S.sloppy(batch.images)):
        label = A.gold(batch.paste_known(way), batch.masks, batch.scenes).label
        assert label.min() >= 1 and label.max() <= 7  # NaN is neither


def test_what_no_one_can_see_costs_little(fills):
    batch, labels = fills
    faint = batch.images + 0.02 * torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(1))
    assert A.gold(batch.paste_known(faint.clamp(0, 1)), batch.masks, batch.scenes).label.mean() > 6.9


def test_the_label_weighs_the_three_scores_as_prefpaint_does():
    r = A.Rating(*(torch.tensor([v]) for v in (1.0, 3.0, 7.0)))
    assert r.label.item() == pytest.approx(0.15 * 1 + 0.15 * 3 + 0.7 * 7)


def test_raters_give_whole_scores_that_stray_from_gold_by_their_noise():
    batch = scene_prompts(3, 0, 300)
    x = batch.paste_known(torch.lerp(batch.images, S.sloppy(batch.images), torch.rand(300, 1, 1, 1)))
    true = A.gold(x, batch.masks, batch.scenes)
    said = A.rate(x, batch.masks, batch.scenes, torch.Generator().manual_seed(0), raters=5, noise=0.4)
    assert len(said) == 5
    for r in said:
        for name in ("structure", "texture", "overall"):
            score = getattr(r, name)
            assert torch.equal(score, score.round()) and score.min() >= 1 and score.max() <= 7
    middle = (true.structure > 2.5) & (true.structure < 5.5)
    error = torch.stack([r.structure - true.structure for r in said])[:, middle]
    # noise 0.4 and rounding: variance 0.16 + 1/12. Bounds of 6 standard errors or more for these counts.
    assert error.numel() > 200 and abs(error.mean()) < 6 * 0.5 / error.numel() ** 0.5
    assert 0.35 < error.std() < 0.65
    assert not torch.equal(said[0].overall, said[1].overall)
    mean = A.mean_label(said)
    assert torch.allclose(mean, sum(r.label for r in said) / 5)


def test_gold_refuses_batches_that_do_not_match():
    batch = scene_prompts(3, 0, 3)
    with pytest.raises(ValueError, match="3 images, 3 masks, 2 scenes"):
        A.gold(batch.images, batch.masks, batch.scenes[:2])
