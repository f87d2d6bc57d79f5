"""The toy's raters: the gold rating that knows the truth, raters who stray from it, and the files of what they said."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minipref.data import rating_files
from minipref.data.ratings import WEIGHTS, Ratings
from minipref.toy import raters, world
from minipref.toy.world import prompt_source, scene_prompts, shown_scene

RGB = torch.from_numpy(world.RGB)


# ------------------------------------------------------------------------------------------------ gold

COUNT = 400


@pytest.fixture(scope="module")
def fills():
    """Scenes with a thing that the hole cuts, and ways to fill the hole."""
    prompts = scene_prompts(77, 0, 1500)
    lay, hole = world.layout(prompts.truth), prompts.masks[:, 0] > 0.5
    cut = torch.zeros(len(prompts), dtype=torch.bool)
    for i in (1, 2):
        body = lay == i
        area, seen = body.flatten(1).sum(1), (body & ~hole).flatten(1).sum(1)
        cut |= (seen > 0.3 * area) & (seen < 0.7 * area)
    prompts = prompts.select(cut.nonzero()[:COUNT, 0])
    lay, hole, x = world.layout(prompts.truth), prompts.masks[:, 0] > 0.5, prompts.images

    def rearranged(s, i):  # a plausible fill: what lies wholly in the hole is left out
        seen = [t for j, t in enumerate(s.things, 1) if ((lay[i] == j) & ~hole[i]).any()]
        return world.Scene(s.background, tuple(seen))

    clean = world.draw([rearranged(s, i) for i, s in enumerate(prompts.truth)])
    flat = torch.stack([RGB[world.COLOURS.index(s.background)] for s in prompts.truth])[:, :, None, None].expand_as(x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    ways = {
        "truth": x,
        "clean": clean,
        "sloppy": world.sloppy(clean),
        "flat background": flat,
        "flat grey": torch.full_like(x, 0.5),
        "blurred": F.avg_pool2d(F.pad(clean, (2, 2, 2, 2), mode="replicate"), 5, 1),
        "noisy": (clean + 0.15 * noise).clamp(0, 1),
        "pastel": 0.5 * clean + 0.5,
        "other colours": clean.roll(1, 1),
        "another scene": x.roll(1, 0),
    }
    return prompts, {
        k: raters.gold(prompts.paste_known(v), prompts.masks, prompts.truth).label for k, v in ways.items()
    }


@pytest.mark.slow
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


@pytest.mark.slow
def test_gold_is_a_number_from_one_to_seven_whatever_the_scene():
    """Among 3,000 scenes are holes that show nothing but a thing's edge."""
    prompts = scene_prompts(5, 0, 3000)
    assert (raters.gold(prompts.images, prompts.masks, prompts.truth).label - 7).abs().max() < 1e-4
    for way in (torch.zeros_like(prompts.images), torch.rand(prompts.images.shape), world.sloppy(prompts.images)):
        label = raters.gold(prompts.paste_known(way), prompts.masks, prompts.truth).label
        assert label.min() >= 1 and label.max() <= 7  # NaN is neither


@pytest.mark.parametrize("seen,share", [(0, 0), (2, 0.25), (6, 0.75), (8, 1), (12, 1)])
def test_how_far_a_hidden_part_is_determined_grows_with_the_part_that_is_seen(seen, share):
    """A thing of 4 × 4 pixels and the rim around it, inside the hole; from half of the thing on it is known in full."""
    things, hole = torch.zeros(1, 12, 12, dtype=torch.int64), torch.ones(1, 12, 12, dtype=torch.bool)
    things[0, 4:8, 4:8] = 1
    for k in range(seen):
        hole[0, 4 + k // 4, 4 + k % 4] = False
    expected = torch.zeros(1, 12, 12)
    expected[0, 3:9, 3:9] = share
    assert torch.allclose(raters._determined(hole, things), expected * hole)


def test_what_no_one_can_see_costs_little(fills):
    prompts, labels = fills
    faint = prompts.images + 0.02 * torch.randn(prompts.images.shape, generator=torch.Generator().manual_seed(1))
    assert raters.gold(prompts.paste_known(faint.clamp(0, 1)), prompts.masks, prompts.truth).label.mean() > 6.9


def test_the_label_weighs_the_three_scores_as_prefpaint_does():
    r = raters.Rating(*(torch.tensor([v]) for v in (1.0, 3.0, 7.0)))
    assert r.label.item() == pytest.approx(0.15 * 1 + 0.15 * 3 + 0.7 * 7)


def test_raters_give_whole_scores_that_stray_from_gold_by_their_noise():
    prompts = scene_prompts(3, 0, 300)
    x = prompts.paste_known(torch.lerp(prompts.images, world.sloppy(prompts.images), torch.rand(300, 1, 1, 1)))
    true = raters.gold(x, prompts.masks, prompts.truth)
    said = raters.rate(x, prompts.masks, prompts.truth, torch.Generator().manual_seed(0), raters=5, noise=0.4)
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


def test_gold_refuses_batches_that_do_not_match():
    prompts = scene_prompts(3, 0, 3)
    with pytest.raises(ValueError, match="3 images, 3 masks, 2 scenes"):
        raters.gold(prompts.images, prompts.masks, prompts.truth[:2])


def test_gold_scores_are_the_labels_of_toy_prompts_and_nothing_for_pictures_of_your_own():
    prompts = scene_prompts(0, 0, 3)
    assert raters.gold_scores(prompts.images, prompts).tolist() == pytest.approx([7.0] * 3)  # the truth itself
    x = prompts.paste_known(torch.rand(3, 3, 32, 32))
    label = raters.gold(x, prompts.masks, prompts.truth).label
    assert (label < 6).all()
    assert torch.equal(raters.gold_scores(x, prompts), label) and torch.equal(raters.gold_reward(x, prompts), label)
    own = replace(prompts, truth=None)
    assert raters.gold_scores(x, own) is None
    with pytest.raises(
        ValueError, match="^gold needs the true scenes of the toy world; pictures of your own have none$"
    ):
        raters.gold_reward(x, own)


def test_gold_labels_of_ratings_do_not_depend_on_what_was_said():
    prompts = scene_prompts(0, 0, 4)
    x = prompts.paste_known(torch.rand(4, 3, 32, 32))
    said, index = torch.ones(4, 2, dtype=torch.float64), torch.arange(4)
    rated = Ratings(prompts, x, said, index, ["toy"] * 4, index > 9)
    expected = raters.gold(x, prompts.masks, prompts.truth).label
    assert torch.equal(raters.gold_labels(rated), expected)
    assert torch.equal(raters.gold_labels(replace(rated, raters=7 * said)), expected)
    assert raters.gold_labels(replace(rated, prompts=replace(prompts, truth=None))) is None


# ------------------------------------------------------------------------------------------------ collecting ratings


def completed(folder, seed=3, start=5, count=4, samples=3, of_seed=None, **more):
    """Random completions of `count` rating prompts, rated and written -> the prompts, the completions."""
    prompts = prompt_source("rating", seed if of_seed is None else of_seed, 32)(start, count)
    noise = torch.rand(count * samples, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images = prompts.repeat_each(samples).paste_known(noise)
    raters.rate_completions(folder, prompts, images, seed=seed, start=start, **more)
    return prompts, images


def lines(folder):
    return [json.loads(x) for x in (folder / "ratings.jsonl").read_text().splitlines()]


def test_rated_completions_carry_their_toy_scenes_and_are_read_back_with_their_truth(tmp_path):
    """Completions stand first, each prompt's side by side; then two of each prompt, widened."""
    prompts, images = completed(tmp_path)
    number = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3] + [0, 0, 1, 1, 2, 2, 3, 3]
    assert [row["scene"] for row in lines(tmp_path)] == [[3_000_012, 5 + n] for n in number]  # "rating" is the third
    r, problems = rating_files.load(tmp_path, 32, truth=shown_scene)
    assert not problems and r.prompts.truth == [prompts.truth[n] for n in number] and r.groups.tolist() == number
    assert r.raters.shape == (20, 3) and r.widened.tolist() == [False] * 12 + [True] * 8
    assert (r.images[:12] - images).abs().max() < 0.5 / 255 + 1e-6
    assert (r.prompts.masked - prompts.masked[number]).abs().max() < 0.5 / 255 + 1e-6
    known = (r.prompts.masks < 0.5).expand_as(r.images)
    assert torch.equal(r.prompts.masks, prompts.masks[number]) and torch.equal(r.images[known], r.prompts.masked[known])
    gold = raters.gold(r.images, r.prompts.masks, [prompts.truth[n] for n in number]).label
    assert torch.allclose(raters.gold_labels(r), gold)
    assert 0.05 < (r.labels - gold).abs().mean() < 0.6  # raters stray, not wildly


def test_ratings_read_without_toy_knowledge_are_the_same_but_for_the_truth(tmp_path):
    completed(tmp_path)
    (knowing, _), (plain, problems) = (rating_files.load(tmp_path, 32, truth=t) for t in (shown_scene, None))
    assert not problems and plain.prompts.truth is None and raters.gold_labels(plain) is None
    for name in ("images", "raters", "labels", "groups", "widened"):
        assert torch.equal(getattr(plain, name), getattr(knowing, name)), name
    assert torch.equal(plain.prompts.masked, knowing.prompts.masked) and plain.strata == knowing.strata
    assert torch.equal(plain.prompts.masks, knowing.prompts.masks)


def test_ratings_that_name_other_scenes_than_they_show_have_no_truth(tmp_path):
    """Rated under a seed that the prompts are not of: all are left out, each by its line; plain reading takes them."""
    completed(tmp_path, seed=3, of_seed=4)
    with pytest.raises(ValueError, match=r"no usable rating; the first of 20 problems: .*ratings.jsonl:1: scene"):
        rating_files.load(tmp_path, 32, truth=shown_scene)
    assert len(rating_files.load(tmp_path, 32)[0]) == 20


def test_each_row_must_show_the_scene_that_it_names(tmp_path):
    """Rows of one scene: the first shows it, the second another picture; the third is of it again, further down."""
    prompts = scene_prompts(9, 0, 2).select([0, 1, 0])
    scores, none = [{k: torch.full((3,), 4.0) for k in WEIGHTS}], torch.zeros(3, dtype=torch.bool)
    scenes = [(9, 0)] * 3
    rating_files.write(tmp_path, prompts, prompts.images, scores, list("abc"), widened=none, source="t", scenes=scenes)
    r, problems = rating_files.load(tmp_path, 32, truth=shown_scene)
    assert [p.partition(": ")[0] for p in problems] == [f"{tmp_path / 'ratings.jsonl'}:2"]
    assert "scene [9, 0] is not what its masked picture shows" in problems[0]
    assert r.prompts.truth == [prompts.truth[0]] * 2


def test_toy_scenes_read_at_another_size_than_theirs_have_no_truth(tmp_path):
    """A model of 64 pixels reads the pictures enlarged, which no toy scene shows: a line for each row, no traceback."""
    completed(tmp_path)
    with pytest.raises(ValueError, match=r"no usable rating; the first of 20 problems: .*ratings.jsonl:1: "):
        rating_files.load(tmp_path, 64, truth=shown_scene)
    assert rating_files.load(tmp_path, 64)[0].images.shape == (20, 3, 64, 64)


def test_ratings_are_a_function_of_seed_and_start_and_named_by_both(tmp_path):
    for name, more in (("a", {}), ("b", {}), ("seed", {"seed": 2}), ("plain", {"widened": False})):
        completed(tmp_path / name, **more)
    a, b, seed, plain = (lines(tmp_path / k) for k in ("a", "b", "seed", "plain"))
    assert a == b and len({(tmp_path / k / a[19]["image"]).read_bytes() for k in ("a", "b")}) == 1
    assert {r["prompt_id"] for r in a} == {f"toy-3-{n:06d}" for n in (5, 6, 7, 8)}
    assert not {r["prompt_id"] for r in a} & {r["prompt_id"] for r in seed}
    assert len(a) == 20 and len(plain) == 12 and not any("origin" in r for r in plain)
    completed(tmp_path / "one", samples=1, source="mine")
    one = lines(tmp_path / "one")
    assert [r.get("origin") for r in one] == [None] * 4 + ["widened"] * 4 and {r["source"] for r in one} == {"mine"}


def test_raters_of_a_later_round_stray_otherwise(tmp_path):
    """Were their noise the same again, the deviations from gold would correlate by 0.16/(0.16 + 1/12) or more, that is
    above 0.6. The correlation of 450 independent ones has a standard error of 0.05."""
    strayed = []
    for start in (0, 500):
        prompts = prompt_source("rating", 3, 32)(start, 50)
        images = torch.lerp(prompts.images, world.sloppy(prompts.images), 0.6)
        images = prompts.paste_known(images).repeat_interleave(3, 0)
        raters.rate_completions(tmp_path / str(start), prompts, images, seed=3, start=start, widened=False)
        r, _ = rating_files.load(tmp_path / str(start), 32, truth=shown_scene)
        strayed.append((r.raters - raters.gold_labels(r)[:, None]).flatten())
    assert abs(float(torch.corrcoef(torch.stack(strayed))[0, 1])) < 0.3


def test_widened_pictures_keep_known_pixels_and_stray_in_the_hole():
    prompts = scene_prompts(0, 0, 64)
    made = prompts.paste_known(torch.rand(64, 3, 32, 32))
    wide = raters.widen(made, prompts, torch.Generator().manual_seed(0))
    known = (prompts.masks < 0.5).expand_as(made)
    assert torch.equal(wide[known], prompts.images[known]) and wide.min() >= 0 and wide.max() <= 1
    assert ((wide - made).abs().amax((1, 2, 3)) > 0).float().mean() > 0.9


def test_a_seam_counts_by_how_far_its_step_exceeds_the_true_scenes_and_what_nobody_notices():
    """A flat picture whose hole, its right half, is off by D: the step at each of the border's pixels is D."""
    hole = torch.zeros(1, 32, 32, dtype=torch.bool)
    hole[:, :, 16:] = True
    flat = torch.full((1, 3, 32, 32), 0.5)
    for D, excess in ((0.3, 0.26), (0.03, 0.0)):
        off = torch.where(hole[:, None], flat + D / 3**0.5, flat)
        assert raters._seam(off, flat, hole).item() == pytest.approx(math.exp(-excess / 0.25), abs=1e-5)
        assert raters._seam(flat, off, hole).item() == 1  # smoother than the truth is no fault


def test_raters_see_completions_and_originals_half_of_the_time_each():
    """Of 400 flat completions (black) and originals (white): black remains what was a completion and is smoothed, 1/8,
    or tinted below black in all three colours, 1/64. That is 56 ± 7: outside 21 to 92 with probability 4e-7. White are
    at least the originals that are smoothed or moved towards themselves, 1/4, 100 ± 9: below 55 with probability 2e-7.
    """
    prompts = scene_prompts(900_000, 0, 4)
    ones = torch.ones_like(prompts.images)
    prompts = replace(prompts, images=ones, masks=ones[:, :1]).select([0] * 400)  # all is hole
    made = raters.widen(torch.zeros_like(prompts.images), prompts, torch.Generator().manual_seed(0))
    same = made.flatten(1).amax(1) - made.flatten(1).amin(1) == 0
    black, white = ((made.flatten(1)[:, 0] == v) & same for v in (0.0, 1.0))
    assert 21 <= int(black.sum()) <= 92 and int(white.sum()) >= 55
