"""What the shipped weights are made from: training pairs of mixed quality, rated completions, splits by prompt."""

import json

import numpy as np
import pytest
import torch

from minipref import pretrain
from minipref.data import scenes as S
from minipref.data.prompts import scene_prompts


def config(**changes):
    return pretrain.PretrainConfig(**changes)


def test_training_pairs_are_clean_outside_the_hole_and_sloppy_inside_about_half_of_the_time():
    """1,500 pictures; six standard errors of a share of one half: ±0.078, false alarm 2e-9."""
    cfg, sloppy, partial = config(unet_batch=1500), 0, 0
    images, masks, texts = pretrain.unet_batch(np.random.default_rng(0), cfg)
    twin = np.random.default_rng(0)
    true = S.draw([S.random_scene(twin) for _ in range(1500)])
    known = (masks < 0.5).expand_as(images)
    assert torch.equal(images[known], true[known])
    for x, t, m in zip(images, true, masks):
        spoilt = not torch.equal(x, t)
        if m.min() == 1:
            assert not spoilt  # text-to-image stays clean
        else:
            partial += 1
            sloppy += spoilt
    assert abs(sloppy / partial - cfg.sloppy_share) < 6 * 0.5 / partial**0.5
    assert abs(1 - partial / 1500 - cfg.full_share) < 6 * 0.5 / 1500**0.5
    assert not any(w in t.split() for t in texts for w in ("clean", "sloppy"))  # nothing that is said reveals which
    assert 0.2 < np.mean([t == "" for t in texts]) < 0.5


def test_captions_of_the_encoders_name_the_quality_half_of_the_time_and_truly():
    images, texts = pretrain.clip_batch(np.random.default_rng(0), 1000)
    twin = np.random.default_rng(0)
    true = S.draw([S.random_scene(twin) for _ in range(1000)])
    said = 0
    for x, t, text in zip(images, true, texts):
        quality = "clean" if torch.equal(x, t) else "sloppy"
        words = text.split()
        said += quality in words
        assert ("sloppy" if quality == "clean" else "clean") not in words
    assert abs(said / 1000 - 0.5) < 6 * 0.5 / 1000**0.5  # false alarm 2e-9


def test_splits_are_by_prompt_and_leak_nothing():
    groups = torch.cat([torch.arange(50).repeat_interleave(3), torch.arange(50)])
    split = pretrain.split_by_prompt(groups, 0)
    assert list(split) == ["features", "ridge", "calibration"]
    assert torch.equal(sum(v.int() for v in split.values()), torch.ones(200, dtype=torch.int32))
    prompts = {k: set(groups[v].tolist()) for k, v in split.items()}
    assert not prompts["features"] & prompts["ridge"] and not prompts["ridge"] & prompts["calibration"]
    assert not prompts["features"] & prompts["calibration"] and len(prompts["features"]) == 30


def test_labels_are_normalised_per_mask_kind():
    norms = {"square": (4.0, 2.0), "strip": (1.0, 0.5)}
    y = pretrain.normalise(torch.tensor([6.0, 2.0, 4.0]), ["square", "strip", "square"], norms)
    assert y.tolist() == [1.0, 2.0, 0.0]
    prompts = scene_prompts(0, 0, 40)
    labels = torch.rand(40) + torch.tensor([3.0 * (k == "strip") for k in prompts.kinds])
    r = pretrain.Ratings(prompts, prompts.images, labels, labels, torch.arange(40), torch.zeros(40, dtype=torch.bool))
    y = pretrain.normalise(labels, prompts.kinds, pretrain.label_norms(r))
    for kind in ("square", "strip"):
        mine = y[[i for i, k in enumerate(prompts.kinds) if k == kind]]
        assert abs(mine.mean()) < 1e-5 and abs(mine.std() - 1) < 1e-5


def test_widened_pictures_keep_known_pixels_and_stray_in_the_hole():
    prompts = scene_prompts(0, 0, 64)
    made = prompts.paste_known(torch.rand(64, 3, 32, 32))
    wide = pretrain.widen(made, prompts, torch.Generator().manual_seed(0))
    known = (prompts.masks < 0.5).expand_as(made)
    assert torch.equal(wide[known], prompts.images[known]) and wide.min() >= 0 and wide.max() <= 1
    assert ((wide - made).abs().amax((1, 2, 3)) > 0).float().mean() > 0.9


def test_learning_rate_warms_up_and_ends_at_nothing():
    factors = [pretrain.warmup_cosine(s, 1000, 100) for s in range(1000)]
    assert factors[0] == 0.01 and factors[99] == 1.0 and factors[100] == 1.0 and factors[999] < 1e-5
    assert factors[550] == pytest.approx(0.5) and all(a >= b for a, b in zip(factors[100:], factors[101:]))


def test_pretraining_runs_from_nothing_to_a_reward_model(tmp_path):
    """A few updates of each part; the files that it leaves are those that the main job loads."""
    small = "--clip-steps 3 --clip-batch 8 --unet-steps 3 --unet-batch 4 --reward-prompts 24 --reward-samples 2"
    more = f"--reward-epochs 1 --reward-steps 2 --out {tmp_path}"
    pretrain.main(["--small", *small.split(), *more.split()])
    figures = json.loads((tmp_path / "pretrain.json").read_text())
    assert list(figures) == ["clip", "unet", "reward"] and figures["reward"]["rated"] == 24 * 4
    assert {"clip.pt", "unet.pt", "reward.pt", "gold_sheet.png"} <= {p.name for p in tmp_path.iterdir()}
    from minipref.pipeline import Pipeline, Sampling, learned_reward

    pipe, prompts = Pipeline.load(tmp_path), scene_prompts(0, 0, 2)
    images = pipe.complete(pipe.unet, prompts, Sampling(2), seed=0, epoch=0)
    assert torch.isfinite(learned_reward(tmp_path)(images, prompts).value).all()
    again = tmp_path / "again"
    pretrain.main(["--small", *small.split(), *more.replace(str(tmp_path), str(again)).split()])
    for name in ("clip.pt", "unet.pt", "reward.pt"):  # the same seed gives the same weights
        a, b = (torch.load(p / name, weights_only=True)["state"] for p in (tmp_path, again))
        assert all(torch.equal(a[k], b[k]) for k in a), name
