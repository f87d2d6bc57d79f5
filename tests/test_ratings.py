"""Rated pictures: the two formats on disk, what is wrong where, splits, normalisation and repeated ratings."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from minipref.data import rating_files
from minipref.data import ratings as R
from minipref.data.prompts import Prompts
from minipref.toy.world import scene_prompts, shown_scene

T = torch.tensor
GREY = (128, 128, 128)


def picture(path, size=32, colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)


def rows(folder, lines):
    folder.mkdir(exist_ok=True)
    text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    (folder / "ratings.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


def row(folder, name="7", k=0, scores=None, **more):
    """One line with its three pictures on disk: left half hole."""
    picture(folder / f"{name}_{k}.png")
    picture(folder / f"{name}_m.png")
    hole = np.zeros((32, 32), np.uint8)
    hole[:, :16] = 255
    Image.fromarray(hole).save(folder / f"{name}_h.png")
    said = scores or {"structure": 2, "texture": 4, "overall": 6}
    plain = {"image": f"{name}_{k}.png", "masked": f"{name}_m.png", "mask": f"{name}_h.png", "prompt_id": name}
    return plain | {"scores": said} | more


# ------------------------------------------------------------------------------------------------ reading


def test_the_label_is_the_papers_weighted_sum(tmp_path):
    r, problems = rating_files.load(rows(tmp_path, [row(tmp_path)]), 32)
    assert not problems and r.labels.tolist() == pytest.approx([0.15 * 2 + 0.15 * 4 + 0.7 * 6])
    assert r.images.shape == (1, 3, 32, 32) and r.prompts.masks[0, 0, :, :16].all()
    assert not r.prompts.masks[0, 0, :, 16:].any() and r.prompts.kinds == ["strip"]
    assert torch.all(r.prompts.masked[0, :, :, :16] == 0.5)  # grey in the hole, whatever the file shows there
    assert torch.equal(r.prompts.masked[0, :, :, 16:], r.images[0, :, :, 16:])


def test_several_raters_are_averaged_and_tell_their_noise(tmp_path):
    def said(x):
        return {"structure": x, "texture": x, "overall": x}

    lines = [row(tmp_path, "a", scores=[said(2), said(4)]), row(tmp_path, "b", scores=[said(5), said(5), said(6.5)])]
    r, _ = rating_files.load(rows(tmp_path, lines + [row(tmp_path, "c", scores=said(1))]), 32)
    assert r.labels.tolist() == pytest.approx([3, 5.5, 1])
    # pooled within pictures: (1 + 1 + 0.25 + 0.25 + 1) / (1 + 2), numpy's ddof by hand
    assert r.noise_scale() == pytest.approx(math.sqrt((2 + 1.5) / 3))
    assert math.isnan(rating_files.load(rows(tmp_path, [row(tmp_path, "c")]), 32)[0].noise_scale())


def test_a_hole_may_be_told_by_the_difference_of_the_two_pictures(tmp_path):
    line = row(tmp_path)
    del line["mask"]
    shown = np.asarray(Image.open(tmp_path / "7_m.png")).copy()
    shown[4:10, 8:20] = GREY
    Image.fromarray(shown).save(tmp_path / "7_m.png")
    r, _ = rating_files.load(rows(tmp_path, [line]), 32)
    assert int(r.prompts.masks.sum()) == 6 * 12 and r.prompts.kinds == ["rectangle"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scores": {"structure": 0, "texture": 4, "overall": 6}}, "score of structure is 0, outside 1 to 7"),
        ({"scores": {"structure": 1, "texture": 7.5, "overall": 6}}, "score of texture is 7.5, outside 1 to 7"),
        ({"scores": {"structure": 1, "texture": 4, "overall": float("nan")}}, "overall is nan, expected a number"),
        ({"scores": {"structure": 1, "texture": 4, "overall": True}}, "overall is True, expected a number"),
        ({"scores": {"structure": 1, "overall": 3}}, "expected structure, texture, overall"),
        ({"scores": []}, "has no scores"),
        ({"mask": "nowhere.png"}, "nowhere.png is missing"),
        ({"image": "nowhere.png"}, "nowhere.png is missing"),
        ({"scene": [1]}, "expected [seed, number]"),
        ({"scene": [-1, 2]}, "expected [seed, number]"),
        ({"scene": [3, 4]}, "scene [3, 4] is not what its masked picture shows: rated in another toy world"),
        ({"scores": {"structure": 10**400, "texture": 4, "overall": 6}}, "outside 1 to 7"),
        ({"origin": "Widened"}, "expected completion or widened"),
        ({"prompt_id": None}, "lacks prompt_id"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_reason_and_left_out(tmp_path, change, message):
    good, bad = row(tmp_path, "a"), row(tmp_path, "b") | change
    r, problems = rating_files.load(rows(tmp_path, [good, bad]), 32, truth=shown_scene)
    assert len(r) == 1 and len(problems) == 1 and r.prompts.truth is None
    assert problems[0].startswith(f"{tmp_path / 'ratings.jsonl'}:2: ") and message in problems[0]
    assert "\n" not in problems[0]


def test_what_is_no_row_at_all_is_named(tmp_path):
    good = row(tmp_path, "a")
    cut = json.dumps(row(tmp_path, "b"))[:40]
    _, problems = rating_files.load(rows(tmp_path, [good, cut, "[]", {"image": "x"}, good]), 32)
    assert [p.split(": ", 1)[1][:17] for p in problems] == [
        "not a JSON object",
        "not a JSON object",
        "lacks masked, pro",
        "a_0.png was rated",
    ]
    with pytest.raises(ValueError, match="no usable rating; the first of 1 problems: .*cut|no usable rating.*JSON"):
        rating_files.load(rows(tmp_path, [cut]), 32)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        rating_files.load(tmp_path / "nowhere", 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither ratings.jsonl nor JSON files"):
        rating_files.load(tmp_path / "empty", 32)


def test_a_damaged_picture_and_a_mask_without_a_hole_are_left_out(tmp_path):
    lines = [row(tmp_path, "a"), row(tmp_path, "b"), row(tmp_path, "c")]
    (tmp_path / "b_0.png").write_bytes(b"no picture")
    Image.new("L", (32, 32), 0).save(tmp_path / "c_h.png")
    r, problems = rating_files.load(rows(tmp_path, lines), 32)
    assert len(r) == 1 and "b_0.png: not a readable picture" in problems[0] and "no white pixel" in problems[1]


def test_deep_nesting_a_mark_of_byte_order_and_another_encoding(tmp_path):
    good = row(tmp_path, "a")
    r, problems = rating_files.load(rows(tmp_path, [good, "[" * 100_000]), 32)
    assert len(r) == 1 and "not a JSON object" in problems[0]
    path = tmp_path / "ratings.jsonl"
    path.write_text(json.dumps(good), encoding="utf-8-sig")
    assert len(rating_files.load(tmp_path, 32)[0]) == 1
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="ratings.jsonl: is not UTF-8 text"):
        rating_files.load(tmp_path, 32)


def test_two_masks_of_one_masked_picture_are_two_masks(tmp_path):
    a = row(tmp_path, "a")
    other = np.zeros((32, 32), np.uint8)
    other[:, 20:] = 255
    Image.fromarray(other).save(tmp_path / "other.png")
    b = row(tmp_path, "a", k=1) | {"mask": "other.png"}
    r, _ = rating_files.load(rows(tmp_path, [a, b]), 32)
    assert r.prompts.masks[0, 0, 0].tolist() == [1.0] * 16 + [0.0] * 16
    assert r.prompts.masks[1, 0, 0].tolist() == [0.0] * 20 + [1.0] * 12


def test_pictures_that_do_not_belong_together_are_named(tmp_path):
    lines = [row(tmp_path, "a"), row(tmp_path, "b"), row(tmp_path, "c")]
    picture(tmp_path / "b_0.png", size=16)
    picture(tmp_path / "c_0.png", colour=(10, 220, 230))
    r, problems = rating_files.load(rows(tmp_path, lines), 32)
    assert len(r) == 1 and "differ in size: 16×16, 32×32" in problems[0]
    assert "c_0.png differs from c_m.png where nothing was to be painted" in problems[1]


def test_one_masked_picture_under_two_ids_is_one_prompt(tmp_path):
    """Careless ids must not carry a picture from one split into another."""
    lines = [row(tmp_path, n) for n in "abcd"]
    for n, colour in (("a", (0, 0, 0)), ("b", (250, 0, 0)), ("c", (0, 0, 0)), ("d", (0, 0, 250))):
        for name in (f"{n}_0.png", f"{n}_m.png"):
            picture(tmp_path / name, colour=colour)
    r, _ = rating_files.load(rows(tmp_path, lines), 32)
    assert r.groups.tolist() == [0, 1, 0, 2]
    joined = [*lines[:2], lines[2] | {"prompt_id": "b"}, lines[3]]  # now a, b and c hang together
    r, _ = rating_files.load(rows(tmp_path, joined), 32)
    assert r.groups.tolist() == [0, 0, 0, 1]


def test_several_folders_are_read_as_one(tmp_path):
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        rows(folder, [row(folder, name)])
        picture(folder / f"{name}_0.png", colour=(9 if name == "a" else 99, 0, 0))
        picture(folder / f"{name}_m.png", colour=(9 if name == "a" else 99, 0, 0))
    r, _ = rating_files.load(f"{tmp_path / 'a'},{tmp_path / 'b'}", 32)
    assert len(r) == 2 and r.groups.tolist() == [0, 1]


def test_another_scale_of_scores_can_be_named(tmp_path):
    line = row(tmp_path, scores={"structure": 0, "texture": 10, "overall": 10})
    r, problems = rating_files.load(rows(tmp_path, [line]), 32, 0, 10)
    assert not problems and r.labels.tolist() == pytest.approx([8.5])


# ------------------------------------------------------------------------------------------------ PrefPaint's layout


def prefpaint(folder, content, ids=("ade_01", "n02")):
    for name in ids:
        for k in range(3):
            picture(folder / "inpaint" / f"{name}_{k}.png")
        picture(folder / "masks_color" / f"{name}_mask_color.png", colour=(0, 0, 0))
        picture(folder / "masks" / f"{name}_mask.png", colour=(255, 255, 255))
    (folder / "ratings.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


FLAT = {"ade_01_0": [3.5, 1], "ade_01_2": [2, 3], "n02_1": [6, 1]}
GROUPED = {"ade_01": {"ade_01_0": [3.5, 1], "ade_01_2": [2, 3]}, "n02": {"n02_1": [6, 1]}}


@pytest.mark.parametrize("content", [FLAT, GROUPED], ids=["flat", "grouped"])
def test_prefpaints_layout_is_read(tmp_path, content):
    r, problems = rating_files.load(prefpaint(tmp_path, content), 32, truth=shown_scene)
    assert not problems and r.labels.tolist() == [3.5, 2, 6] and r.groups.tolist() == [0, 0, 1]
    assert r.prompts.masks.all() and r.strata == ["ade/full", "ade/full", "n/full"]
    assert math.isnan(r.noise_scale()) and r.prompts.truth is None


def test_the_hole_of_prefpaints_layout_is_that_of_its_mask(tmp_path):
    """Also where a completion has painted nothing there."""
    folder = prefpaint(tmp_path, FLAT)
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, 16:] = 255
    for name in ("ade_01", "n02"):
        Image.fromarray(half).save(folder / "masks" / f"{name}_mask.png")
        for k in range(3):
            picture(folder / "inpaint" / f"{name}_{k}.png", colour=(0, 0, 0))
    r, problems = rating_files.load(folder, 32)
    assert not problems and r.prompts.masks[:, :, :, 16:].all() and not r.prompts.masks[:, :, :, :16].any()


@pytest.mark.parametrize(
    "content, message",
    [
        (json.dumps(FLAT)[:30], "cut short or damaged"),
        ("[1, 2]", "expected an object of ratings"),
        ({"ade_01_0": [9, 1]}, "the score is 9, outside 1 to 7"),
        ({"ade_01_0": 3}, "expected .score, rank."),
        ({"0": [3, 1]}, "expected a key ID_k"),
        ({"ade_01_7": [3, 1]}, "ade_01_7.png is missing"),
        ('{"ade_01_0": [3, 1], "ade_01_0": [4, 1]}', "was rated before"),
    ],
)
def test_what_is_wrong_in_prefpaints_layout_is_one_line(tmp_path, content, message):
    try:
        _, problems = rating_files.load(prefpaint(tmp_path, content), 32)
        (line,) = problems
    except ValueError as e:
        line = str(e)
    assert "\n" not in line
    assert re.search(message, line), line


def test_prompts_with_a_single_rated_picture_are_counted():
    assert R.lonely(T([0, 0, 1, 2, 2, 3])) == 2 and R.lonely(T([0, 0])) == 0


@pytest.mark.parametrize(
    "hole, kind",
    [
        (np.s_[:, :20], "strip"),
        (np.s_[8:14, 4:20], "rectangle"),
        (np.s_[:, :], "full"),
    ],
)
def test_the_kind_of_a_mask_is_told_by_its_outline(hole, kind):
    mask = torch.zeros(1, 32, 32)
    mask[0][hole] = 1
    assert rating_files.mask_kind(mask) == kind
    if kind == "rectangle":  # the other way round: a visible rectangle
        assert rating_files.mask_kind(1 - mask) == "square"
        mask[0, 8, 4] = 0  # a corner less: no rectangle any more
        assert rating_files.mask_kind(mask) == "warp"


# ------------------------------------------------------------------------------------------------ writing


def test_what_is_written_is_read_back(tmp_path):
    prompts = scene_prompts(9, 0, 3).repeat_each(2)
    images = prompts.paste_known(torch.rand(6, 3, 32, 32))
    scores = [{k: torch.randint(1, 8, (6,)).float() for k in R.WEIGHTS} for _ in range(2)]
    names = [f"p{i // 2}" for i in range(6)]
    widened = T([False, True] * 3)
    scenes = [(9, i // 2) for i in range(6)]
    rating_files.write(tmp_path, prompts, images, scores, names, widened=widened, source="toy", scenes=scenes)
    r, problems = rating_files.load(tmp_path, 32, truth=shown_scene)
    assert not problems and (r.images - images).abs().max() < 0.5 / 255 + 1e-6
    assert torch.equal(r.prompts.masks, prompts.masks) and r.prompts.kinds == prompts.kinds
    assert (r.prompts.masked - prompts.masked).abs().max() < 0.5 / 255 + 1e-6
    assert r.prompts.truth == prompts.truth and torch.equal(r.widened, widened)
    assert r.groups.tolist() == [0, 0, 1, 1, 2, 2] and r.strata == [f"toy/{k}" for k in prompts.kinds]
    said = torch.stack([0.15 * x["structure"] + 0.15 * x["texture"] + 0.7 * x["overall"] for x in scores], 1)
    assert torch.allclose(r.raters, said.double()) and torch.allclose(r.labels, (said[:, 0] + said[:, 1]) / 2)
    with pytest.raises(ValueError, match="prompt p0 was rated before"):  # nothing that was saved is overwritten
        rating_files.write(tmp_path, prompts, images, scores, names, widened=widened, source="toy")
    more = [f"q{i}" for i in range(6)]
    rating_files.write(tmp_path, prompts, images, scores, more, widened=widened, source="toy")
    r, _ = rating_files.load(tmp_path, 32, truth=shown_scene)
    assert len(r) == 12 and r.prompts.truth is None  # half of them name no scene: nothing is judged by a part


# ------------------------------------------------------------------------------------------------ in memory


def ratings(labels, groups=None, sources=None, kinds=None):
    n = len(labels)
    prompts = Prompts(torch.zeros(n, 3, 2, 2), torch.ones(n, 1, 2, 2), [""] * n, kinds or ["full"] * n)
    groups = torch.arange(n) if groups is None else groups
    raters = T(labels, dtype=torch.float64)[:, None]
    return R.Ratings(prompts, prompts.images, raters, groups, sources or ["s"] * n, torch.zeros(n, dtype=torch.bool))


def test_splits_are_by_prompt_and_leak_nothing():
    groups = torch.cat([torch.arange(50).repeat_interleave(3), torch.arange(50)])
    split = R.split_by_prompt(groups, 0)
    assert list(split) == ["features", "ridge", "judge"]
    assert torch.equal(sum(v.int() for v in split.values()), torch.ones(200, dtype=torch.int32))
    prompts = {k: set(groups[v].tolist()) for k, v in split.items()}
    assert not prompts["features"] & prompts["ridge"] and not prompts["ridge"] & prompts["judge"]
    assert not prompts["features"] & prompts["judge"]
    assert [len(v) for v in prompts.values()] == [30, 12, 8]
    assert not torch.equal(split["ridge"], R.split_by_prompt(groups, 1)["ridge"])


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="2 prompts are too few to split: none is left for 'ridge'"):
        R.split_by_prompt(T([0, 0, 1]), 0)


def test_labels_are_normalised_per_source_and_mask_kind():
    kinds = ["square"] * 40 + ["strip"] * 20 + ["warp"] * 19
    sources = ["a"] * 20 + ["b"] * 59
    labels = [1.0, 3] * 10 + [4.0, 6] * 10 + [5.0] * 20 + [2.0] * 18 + [7.0]
    r = ratings(labels, sources=sources, kinds=kinds)
    norms = R.label_norms(r)
    s = math.sqrt(20 / 19)  # the standard deviation (n − 1) of ten pairs of numbers that lie 2 apart
    assert norms["a/square"] == pytest.approx((2, s)) and norms["b/square"] == pytest.approx((5, s))
    assert norms[""] == pytest.approx((np.mean(labels), np.std(labels, ddof=1)))
    assert set(norms) == {"", "a/square", "b/square"}  # without spread, or with 19 ratings: those of all together
    y = R.normalise(r.labels, r.strata, norms)
    assert y[:2].tolist() == pytest.approx([-1 / s, 1 / s]) and y[20:22].tolist() == pytest.approx([-1 / s, 1 / s])
    assert y[-1].item() == pytest.approx((7 - norms[""][0]) / norms[""][1])
    assert R.denormalise(y, r.strata, norms).tolist() == pytest.approx(r.labels.tolist())


def test_equal_ratings_are_refused():
    with pytest.raises(ValueError, match="all 3 ratings are 2: nothing to learn"):
        R.label_norms(ratings([2.0, 2, 2]))


def test_a_selection_keeps_what_belongs_together():
    r = ratings([1.0, 2, 3], sources=["a", "b", "c"], kinds=["full", "warp", "strip"])
    part = r.select(T([True, False, True]))
    assert part.labels.tolist() == [1, 3] and part.strata == ["a/full", "c/strip"] and part.groups.tolist() == [0, 2]
