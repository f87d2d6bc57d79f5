"""The reward model: features, inner product, scores that depend on the picture alone (PrefPaint Sections 3 and 4)."""

import math

import pytest
import torch
from helpers import gaussian, learned

from minipref import reward_model as R
from minipref.data.prompts import Prompts
from minipref.data.ratings import Ratings
from minipref.models.clip import CLIP, CLIPConfig
from minipref.models.reward_features import ClipFeatures, FeatureConfig, RewardFeatures
from minipref.toy.world import scene_prompts

T = torch.tensor
DOUBLE = torch.float64


# ------------------------------------------------------------------------------------------------ the learned reward


def test_scores_do_not_depend_on_mode_batch_or_order():
    """PrefPaint's released reward keeps its dropout on while scoring; this one cannot."""
    model, prompts = learned().train(), scene_prompts(5, 0, 6)
    images = prompts.images.flip(0)
    whole = model(images, prompts)
    assert not model.training and not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.features.parameters())
    halves = [model(images[i : i + 3], prompts.select(slice(i, i + 3))) for i in (0, 3)]
    for name in ("value", "trust"):
        joined = torch.cat([getattr(h, name) for h in halves])
        assert torch.allclose(getattr(whole, name), joined, atol=1e-6)
    order = [3, 1, 5, 0, 2, 4]
    assert torch.allclose(model(images[order], prompts.select(order)).value, whole.value[order], atol=1e-6)


def test_the_learned_reward_is_the_inner_product_of_features_and_psi():
    model, prompts = learned(), scene_prompts(5, 0, 4)
    z = model.features(prompts.images, prompts.masked, prompts.masks).double()
    scores = model(prompts.images, prompts)
    norm = model.ridge.norm(z)
    assert torch.allclose(scores.value.double(), z @ model.ridge.psi, atol=1e-6)
    assert torch.allclose(scores.parts["norm"].double(), norm, atol=1e-6)
    assert torch.allclose(scores.parts["bound"].double(), model.bound(z, 0.05), atol=1e-5)
    assert torch.allclose(scores.trust.double(), torch.exp(-1.5 * norm + 0.3), atol=1e-6)


def test_features_look_at_completion_masked_picture_and_mask():
    model, prompts = learned(), scene_prompts(5, 0, 2)
    z = model.z(prompts.images, prompts)
    assert z.shape == (2, 5)
    assert not torch.allclose(z, model.z(prompts.images.roll(1, 0), prompts))
    other = Prompts(prompts.images, prompts.masks.flip(-1), prompts.texts, prompts.kinds, prompts.truth)
    assert not torch.allclose(z, model.z(prompts.images, other))
    swapped = model.features(prompts.masked, prompts.images, prompts.masks)
    assert not torch.allclose(z, swapped)


def test_a_completion_at_the_limit_itself_is_trusted():
    model, prompts = learned(), scene_prompts(5, 0, 3)
    norms = model.ridge.norm(model.z(prompts.images, prompts)).sort()
    model.calibration.norm_quantiles["0.99"] = float(norms.values[1])
    trusted = model(prompts.images, prompts).parts["trusted"]
    assert trusted[norms.indices].tolist() == [1, 1, 0]


def identity_tower(channel, stages):
    """Convolutions that pass one input channel on; z is what was pooled, single pixels first."""
    dim = 2 * (1 + stages)
    tower = RewardFeatures(FeatureConfig(pixel_width=1, widths=(1,) * stages, dim=dim))
    with torch.no_grad():
        for p in tower.parameters():
            p.zero_()
        for i, stage in enumerate(tower.stages):
            middle = stage[0].kernel_size[0] // 2
            stage[0].weight[0, channel if i == 0 else 0, middle, middle] = stage[2].weight[0, 0, middle, middle] = 1
        for layer in (tower.project[0], tower.project[2]):
            layer.weight.copy_(torch.eye(dim))
    return tower


def test_features_pool_mean_and_maximum_over_the_hole_by_hand():
    """Identity convolutions over a constant picture: the mean and the maximum over the hole are known at each depth."""
    tower = identity_tower(0, 1)
    images = torch.full((1, 3, 4, 4), 0.5)
    images[0, 0, 0, 0], images[0, 0, 0, 1], images[0, 0, 3, 3] = 1.0, 0.75, 1.0  # the last lies outside the hole
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., 0, :] = 1
    z = tower(images, images, masks)  # channel 0 of the input is 2·red − 1: 1, ½, 0, 0 in the hole
    assert z[0].tolist() == pytest.approx([1.5 / 4, 1.0] * 2)  # single pixels, then 3×3


def test_features_read_the_masked_picture_in_the_same_units():
    masked = torch.full((1, 3, 4, 4), 0.5)
    masked[0, 0, :, :2] = 0.75  # channel 3 of the input is 2·red − 1: ½ in half of the hole
    z = identity_tower(3, 1)(torch.zeros(1, 3, 4, 4), masked, torch.ones(1, 1, 4, 4))
    assert z[0].tolist() == pytest.approx([0.25, 0.5] * 2)


def test_a_picture_without_a_hole_has_finite_features():
    x = torch.rand(1, 3, 4, 4)
    assert torch.equal(identity_tower(0, 1)(x, x, torch.zeros(1, 1, 4, 4)), torch.zeros(1, 4))


def test_each_later_stage_sees_half_the_resolution():
    images = torch.full((1, 3, 4, 4), 0.5)
    images[0, 0, ::2, ::2] = 1.0  # the pixels that stride 2 keeps
    z = identity_tower(0, 2)(images, images, torch.ones(1, 1, 4, 4))
    assert z[0].tolist() == pytest.approx([0.25, 1.0, 0.25, 1.0, 1.0, 1.0])


def clip_features(freeze=0.7, layers=3):
    clip = CLIP(CLIPConfig(16, vocab_size=9, text_layers=1, text_hidden_size=8, text_heads=2, text_intermediate_size=8,
                           image_size=8, patch_size=4, vision_hidden_size=16, vision_layers=layers, vision_heads=2,
                           vision_intermediate_size=16))  # fmt: skip
    return clip, ClipFeatures.start_from(clip, 5, freeze)


def test_the_clip_tower_starts_as_clips_own_and_sees_both_pictures():
    clip, features = clip_features()
    x, masked, masks = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), torch.ones(2, 1, 8, 8)
    unit = torch.nn.functional.normalize(features.embed(x), dim=-1)
    assert torch.allclose(unit, clip.encode_image(x), atol=1e-6)
    z = features.eval()(x, masked, masks)
    assert z.shape == (2, 5)
    assert not torch.allclose(z, features(x.flip(0), masked, masks)) and not torch.allclose(z, features(x, x, masks))
    large = torch.nn.functional.interpolate(x, size=16)
    assert torch.allclose(
        torch.nn.functional.normalize(features.embed(large), dim=-1), clip.encode_image(large), atol=1e-6
    )


@pytest.mark.parametrize("freeze, layers, rest", [(1.0, 3, True), (0.7, 2, True), (0.3, 1, True), (0.0, 0, False)])
def test_the_first_share_of_the_layers_is_frozen(freeze, layers, rest):
    _, features = clip_features(freeze)
    tower = features.vision_model
    frozen = [not any(p.requires_grad for p in layer.parameters()) for layer in tower.encoder.layers]
    assert frozen == [True] * layers + [False] * (3 - layers)
    assert not tower.embeddings.class_embedding.requires_grad == rest
    assert features.visual_projection.weight.requires_grad == (freeze < 1)
    assert all(p.requires_grad for p in [*features.mix.parameters(), *features.project.parameters()])
    if freeze == 1:
        assert not any(p.requires_grad for p in tower.parameters())


def test_a_share_of_layers_that_is_none_is_refused():
    with pytest.raises(ValueError, match="freeze=1.5"):
        clip_features(1.5)


def test_scoring_never_drops_features_though_training_did(tmp_path):
    """PrefPaint's released reward keeps its dropout on: scores of one picture differ from call to call."""
    _, features = clip_features()
    model = R.LearnedReward(features, R.ridge_fit(gaussian(20, 5), gaussian(20), 0.5), R.Calibration(1, 0))
    features.train()
    x, b = torch.rand(4, 3, 8, 8), Prompts(torch.rand(4, 3, 8, 8), torch.ones(4, 1, 8, 8), [""] * 4, ["full"] * 4)
    assert torch.equal(model.z(x, b), model.z(x, b)) and not features.training
    model.save(tmp_path / "reward.pt", {})
    again = R.LearnedReward.load(tmp_path / "reward.pt")
    assert torch.allclose(again.z(x, b), model.z(x, b), atol=2e-2)  # weights are kept in half precision


def test_the_bound_of_a_model_is_that_of_its_ridge_under_its_stated_assumptions():
    model = learned(noise_scale=0.3, psi_norm=2.0)
    z = gaussian(7, 5, seed=4)
    assert torch.allclose(model.bound(z, 0.1), model.ridge.bound(z, 0.1, 0.3, 2.0))
    assert model.bound_factor(0.1) == model.ridge.bound_factor(0.1, 0.3, 2.0)
    assert "scale 0.3" in model.assumptions() and "= 2" in model.assumptions()


def test_a_completion_is_trusted_up_to_the_99th_percentile_of_the_training_norms():
    prompts = scene_prompts(5, 0, 8)
    norm = learned()(prompts.images, prompts).parts["norm"]
    limit = float(norm.sort().values[4])  # five of eight lie at or under it
    parts = learned(norm_quantiles={"0.99": limit + 1e-6, "0.5": 0.0})(prompts.images, prompts).parts
    assert parts["trusted"].tolist() == [float(n <= limit + 1e-6) for n in norm] and parts["trusted"].sum() == 5


def test_a_models_clamp_holds_its_trust():
    prompts = scene_prompts(5, 0, 8)
    free, held = (learned(**k)(prompts.images, prompts).trust for k in ({}, {"lo": 0.9, "hi": 1.0}))
    assert torch.equal(held, free.clamp(0.9, 1.0)) and not torch.equal(held, free)


def test_the_papers_constants_may_go_with_the_papers_norm():
    model, prompts = learned(norm_kind="paper"), scene_prompts(5, 0, 4)
    norm = model.ridge.norm(model.z(prompts.images, prompts), "paper")
    scores = model(prompts.images, prompts)
    assert torch.allclose(scores.trust.double(), torch.exp(-1.5 * norm + 0.3), atol=1e-6)
    theorem = model.ridge.norm(model.z(prompts.images, prompts))
    assert torch.allclose(scores.parts["norm"].double(), theorem, atol=1e-6)  # the guard's norm stays the theorem's


def test_a_saved_reward_scores_as_before(tmp_path):
    model, prompts = learned(), scene_prompts(5, 0, 4)
    with torch.no_grad():
        for p in model.features.parameters():
            p.copy_(p.half())  # stored in half precision
    model.save(tmp_path / "reward.pt", {})
    again = R.LearnedReward.load(tmp_path / "reward.pt")
    a, b = model(prompts.images, prompts), again(prompts.images, prompts)
    assert (
        torch.equal(a.value, b.value)
        and torch.equal(a.trust, b.trust)
        and torch.equal(a.parts["norm"], b.parts["norm"])
    )
    assert again.calibration == model.calibration and again.ridge.lam == 0.5
    content = torch.load(tmp_path / "reward.pt", weights_only=True)
    del content["state"]["psi"]
    torch.save(content, tmp_path / "reward.pt")
    with pytest.raises(ValueError, match="not a whole reward model.*psi"):
        R.LearnedReward.load(tmp_path / "reward.pt")


# ------------------------------------------------------------------------------------------------ how good is it


def test_a_reward_is_judged_by_the_truth_where_it_is_known_and_else_by_the_raters_mean():
    """Errors, computed from the scores: against the truth 2, 4, 6, against the raters' means, against the first."""
    model, prompts = learned(), scene_prompts(5, 0, 3)
    said = T([[1.0, 3.0], [5.0, 6.0], [3.0, math.nan]], dtype=DOUBLE)
    rated = Ratings(prompts, prompts.images, said, T([0, 1, 2]), ["toy"] * 3, torch.zeros(3, dtype=torch.bool))
    scores, scale = model(prompts.images, prompts), model.calibration.label_norms
    mean, spread = (T([scale[f"toy/{k}"][i] for k in prompts.kinds], dtype=DOUBLE) for i in (0, 1))
    value = model.z(prompts.images, prompts).double() @ model.ridge.psi
    first = T([1.0, 5.0, 3.0], dtype=DOUBLE)
    for truth, expected in ((T([2.0, 4.0, 6.0]), [2.0, 4.0, 6.0]), (None, [2.0, 5.5, 3.0])):
        judged = R.judge_reward(model, rated, truth, 0.1)
        y = (T(expected, dtype=DOUBLE) - mean) / spread
        error = (value - y).abs()
        assert torch.allclose(judged.guess, value) and torch.allclose(judged.truth, y)
        assert torch.allclose(judged.single, (first - mean) / spread)
        assert judged.figures["error_median"] == pytest.approx(float(error.median()))
        assert judged.figures["mean_error_on_scale"] == pytest.approx(float((error * spread).mean()), rel=1e-5)
        bound = model.bound_factor(0.1) * scores.parts["norm"].double()
        assert judged.figures["bound_coverage"] == pytest.approx(float((error <= bound).double().mean()))
        assert judged.figures["gamma_q50"] == pytest.approx(float(scores.trust.median()))
