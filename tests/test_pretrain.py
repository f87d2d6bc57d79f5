"""What the shipped weights are made from: training pairs of mixed quality, rated completions, splits by prompt."""

import json

import numpy as np
import pytest
import torch

from minipref import pretrain
from minipref.data import scenes as S
from minipref.data.prompts import scene_prompts
from minipref.pipeline import Pipeline, Sampling, learned_reward


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


def test_learning_rate_warms_up_and_ends_at_nothing():
    factors = [pretrain.warmup_cosine(s, 1000, 100) for s in range(1000)]
    assert factors[0] == 0.01 and factors[99] == 1.0 and factors[100] == 1.0 and factors[999] < 1e-5
    assert factors[550] == pytest.approx(0.5) and all(a >= b for a, b in zip(factors[100:], factors[101:]))


def test_most_training_times_are_noisy_ones_and_all_occur():
    """Shares of [0, 0.35) and above: 0.3·0.35 and the rest; 6 standard errors of 100,000 draws: 2e-9."""
    t = pretrain.training_times(100_000, 1000, 0.7, torch.Generator().manual_seed(0))
    assert t.min() == 0 and t.max() == 999 and t.shape == (100_000,)
    share, early = (t < 350).double().mean().item(), 0.3 * 0.35
    assert abs(share - early) < 6 * (early * (1 - early) / 1e5) ** 0.5
    late = (t >= 675).double().mean().item()  # half of the noisy range, 0.325 of the uniform one
    assert abs(late - (0.7 * 0.5 + 0.3 * 0.325)) < 6 * 0.5 / 1e5**0.5
    plain = pretrain.training_times(100_000, 1000, 0.0, torch.Generator().manual_seed(0)).double()
    assert abs(plain.mean().item() - 499.5) < 6 * 288.7 / 1e5**0.5


def test_pretraining_runs_from_nothing_to_a_model_that_samples(tmp_path):
    """A few updates of each part; the files that it leaves are those that the main job loads."""
    small = "--clip-steps 3 --clip-batch 8 --unet-steps 3 --unet-batch 4 --reward-prompts 20 --reward-dim 4 --out"
    pretrain.main(["--small", *small.split(), str(tmp_path)])
    figures = json.loads((tmp_path / "pretrain.json").read_text())
    assert list(figures) == ["clip", "unet", "reward"] and {"clip.pt", "unet.pt", "reward.pt"} <= {
        p.name for p in tmp_path.iterdir()
    }
    pipe, prompts = Pipeline.load(tmp_path), scene_prompts(0, 0, 2)
    images = pipe.complete(pipe.unet, prompts, Sampling(2), seed=0, epoch=0)
    assert torch.isfinite(learned_reward(tmp_path)(images, prompts).value).all()
    more = tmp_path / "more"  # trained on: from those weights, with other scenes and noise
    (more).mkdir()
    (more / "clip.pt").write_bytes((tmp_path / "clip.pt").read_bytes())
    onward = "--only unet --unet-steps 1 --unet-batch 4 --unet-lr 0 --ema 0"
    pretrain.main(["--small", *onward.split(), "--out", str(more), "--start-from", str(tmp_path)])
    first, second = (torch.load(p / "unet.pt", weights_only=True) for p in (tmp_path, more))
    assert [s["steps"] for s in second["meta"]["stages"]] == [3, 1] and len(first["meta"]["stages"]) == 1
    assert all(torch.equal(first["state"][k], second["state"][k]) for k in first["state"])
    assert first["meta"]["stages"][0]["loss"] != second["meta"]["stages"][1]["loss"]
    again = tmp_path / "again"
    pretrain.main(["--small", *small.split(), str(again)])
    for name in ("clip.pt", "unet.pt", "reward.pt"):  # the same seed gives the same weights
        a, b = (torch.load(p / name, weights_only=True)["state"] for p in (tmp_path, again))
        assert all(torch.equal(a[k], b[k]) for k in a), name
