"""The reward model, its ridge solution and bound (PrefPaint Eqs. 3–12), and the rewards that `--reward` names."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from minipref import rewards as R
from minipref.data.prompts import Prompts, scene_prompts

T = torch.tensor
DOUBLE = torch.float64


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def learned(seed=0):
    torch.manual_seed(seed)
    features = R.RewardFeatures(R.FeatureConfig(widths=(4, 6), dim=5))
    ridge = R.ridge_fit(gaussian(40, 5), gaussian(40, seed=1), 0.5)
    return R.LearnedReward(features, ridge, 1.5, 0.3, {"0.5": 0.2, "0.99": 0.9})


# ------------------------------------------------------------------------------------------------ ridge


def test_ridge_solves_the_normal_equations_in_float64():
    """Ridge is least squares on data with sqrt(lam)·I stacked below: numpy solves that by other means."""
    Z, y, lam = gaussian(30, 4), gaussian(30, seed=1), 0.7
    ridge = R.ridge_fit(Z.float(), y.float(), lam)
    assert ridge.psi.dtype == DOUBLE and ridge.lam == lam
    stacked = np.vstack([Z.float().double().numpy(), math.sqrt(lam) * np.eye(4)])
    target = np.concatenate([y.float().double().numpy(), np.zeros(4)])
    expected = np.linalg.lstsq(stacked, target, rcond=None)[0]
    assert np.allclose(ridge.psi.numpy(), expected, atol=1e-12)
    assert torch.allclose(ridge(Z[:3]), Z[:3] @ T(expected), atol=1e-12)


def test_V_is_the_gram_matrix_plus_the_penalty():
    Z = gaussian(30, 4)
    ridge = R.ridge_fit(Z, gaussian(30), 0.7)
    V = sum(torch.outer(z, z) for z in Z) + 0.7 * torch.eye(4, dtype=DOUBLE)
    assert torch.allclose(ridge.V_cholesky @ ridge.V_cholesky.T, V, atol=1e-12)
    assert torch.equal(ridge.V_cholesky, ridge.V_cholesky.tril())


def test_the_theorems_norm_and_the_papers_printed_norm():
    Z, z = gaussian(30, 4), gaussian(6, 4, seed=3)
    ridge = R.ridge_fit(Z, gaussian(30), 0.7)
    inverse = torch.from_numpy(np.linalg.inv((Z.T @ Z).numpy() + 0.7 * np.eye(4)))
    for kind, expected in (
        ("theorem", [math.sqrt(float(v @ inverse @ v)) for v in z]),
        ("paper", [float((v @ inverse).square().sum().sqrt()) for v in z]),
    ):
        assert ridge.norm(z, kind).tolist() == pytest.approx(expected, rel=1e-10)
    assert torch.equal(ridge.norm(z), ridge.norm(z, "theorem"))
    with pytest.raises(ValueError, match="choose theorem or paper"):
        ridge.norm(z, "other")
    with pytest.raises(ValueError, match=r"\(6, 3\), expected \(B, 4\)"):
        ridge.norm(z[:, :3])


def test_the_error_is_the_identity_of_equation_five_and_obeys_equation_seven():
    """psi_hat − psi_* = V⁻¹Zᵀnoise − lam V⁻¹ psi_*, and |zᵀ(psi_hat − psi_*)| ≤ ‖z‖(‖Zᵀnoise‖ + sqrt(lam)‖psi_*‖)."""
    Z, psi, noise, lam = gaussian(30, 4), gaussian(4, seed=1), gaussian(30, seed=2), 0.7
    ridge = R.ridge_fit(Z, Z @ psi + noise, lam)
    V = Z.T @ Z + lam * torch.eye(4, dtype=DOUBLE)
    error = ridge.psi - psi
    assert torch.allclose(error, torch.linalg.solve(V, Z.T @ noise - lam * psi), atol=1e-10)
    s = (Z.T @ noise)[None]
    for z in gaussian(200, 4, seed=5):
        bound = ridge.norm(z[None]) * (ridge.norm(s) + math.sqrt(lam) * psi.norm())
        assert abs(z @ error) <= bound + 1e-12


def test_the_papers_printed_norm_is_no_bound():
    """A direction that the data know well, seen through a large V: ‖zᵀV⁻¹‖ shrinks twice as fast as the error."""
    Z = torch.full((100, 1), 10.0, dtype=DOUBLE)
    psi, noise = T([1.0], dtype=DOUBLE), torch.ones(100, dtype=DOUBLE)
    ridge = R.ridge_fit(Z, Z @ psi + noise, 1.0)
    z, s = torch.ones(1, 1, dtype=DOUBLE), (Z.T @ noise)[None]
    error = abs(float(ridge(z)) - float(z @ psi))
    assert error <= float(ridge.norm(z) * (ridge.norm(s) + psi.norm())) + 1e-12
    assert error > float(ridge.norm(z, "paper") * (ridge.norm(s, "paper") + psi.norm()))


def test_the_determinants_are_those_of_an_independent_computation():
    Z = gaussian(30, 4)
    ridge = R.ridge_fit(Z, gaussian(30), 0.7)
    eigenvalues = np.linalg.eigvalsh((Z.T @ Z).numpy())
    assert ridge.log_det_ratio() == pytest.approx(sum(math.log(1 + e / 0.7) for e in eigenvalues), rel=1e-10)


def test_bound_factor_is_equation_eight_by_hand():
    """One feature of 1, three samples, lam 1: det(V)/det(lam I) = 4; s·sqrt(2 log(2/delta)) + psi_norm."""
    ridge = R.ridge_fit(torch.ones(3, 1), torch.zeros(3), 1.0)
    assert ridge.bound_factor(0.1, 0.5, 2.0) == pytest.approx(0.5 * math.sqrt(2 * math.log(20)) + 2.0)
    four = R.ridge_fit(torch.ones(3, 1), torch.zeros(3), 4.0)  # det ratio 7/4, sqrt(lam) = 2
    assert four.bound_factor(0.1, 0.5, 2.0) == pytest.approx(0.5 * math.sqrt(math.log(7 / 4) + 2 * math.log(10)) + 4.0)
    z = T([[3.0]])
    assert ridge.bound(z, 0.1, 0.5, 2.0).item() == pytest.approx(ridge.bound_factor(0.1, 0.5, 2.0) * 1.5)
    for delta in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            ridge.bound_factor(delta, 0.5, 2.0)


def test_the_martingale_identity_behind_the_bound():
    """E[(det(lam I)/det V)^½ exp(‖Zᵀnoise‖²_V⁻¹ / (2 s²))] = 1 for Gaussian noise of scale s (Abbasi-Yadkori et al.).

    Every eigenvalue of ZᵀZ lies below lam, so the variance is finite. 200,000 draws; 6 standard errors: 2e-9."""
    Z, lam, s = gaussian(8, 3) * 0.2, 1.0, 0.7
    ridge = R.ridge_fit(Z, gaussian(8), lam)
    assert torch.linalg.eigvalsh(Z.T @ Z).max() < lam / 2
    noise = s * gaussian(200_000, 8, seed=9)
    value = torch.exp(ridge.norm(noise @ Z).square() / (2 * s**2) - ridge.log_det_ratio() / 2)
    assert abs(value.mean().item() - 1) < 6 * value.std().item() / math.sqrt(len(value)) < 0.02


def test_ridge_stays_finite_on_rank_deficient_and_ill_conditioned_features():
    z = gaussian(50, 1)
    for Z in (z.repeat(1, 6), torch.zeros(50, 6, dtype=DOUBLE), z * 10.0 ** torch.arange(-6, 6, 2, dtype=DOUBLE)):
        ridge = R.ridge_fit(Z, gaussian(50, seed=1), 0.01)
        assert torch.isfinite(ridge.psi).all() and torch.isfinite(ridge.norm(gaussian(3, 6))).all()
        assert math.isfinite(ridge.log_det_ratio())


def test_ridge_refuses_what_it_cannot_solve():
    with pytest.raises(ValueError, match=r"\(5, 2\) and y \(4,\)"):
        R.ridge_fit(gaussian(5, 2), gaussian(4), 1.0)
    with pytest.raises(ValueError, match="lam=0"):
        R.ridge_fit(gaussian(5, 2), gaussian(5), 0)


# ------------------------------------------------------------------------------------------------ trust


def test_trust_weight_is_equation_eleven_with_its_clamp():
    norm = T([0.0, 10.0, 40.0], dtype=DOUBLE)
    gamma = R.trust_weight(norm, 0.05, 0.7)
    assert gamma.tolist() == pytest.approx([math.exp(0.7), math.exp(0.2), math.exp(-1.3)])
    assert R.trust_weight(T([200.0]), 0.05, 0.7).item() == pytest.approx(math.exp(-9.3))  # no clamp unless asked for
    assert R.trust_weight(norm, 0.05, 0.7, 1.0, 1.5).tolist() == pytest.approx([1.5, math.exp(0.2), 1.0])


def test_default_trust_is_one_at_the_median_and_half_at_the_95th_percentile():
    norms = torch.arange(101, dtype=DOUBLE) / 10  # median 5, 95th percentile 9.5
    k, b = R.trust_from_quantiles(norms)
    assert R.trust_weight(T([5.0, 9.5]), k, b).tolist() == pytest.approx([1.0, 0.5])
    k, b = R.trust_from_quantiles(torch.ones(5))  # no spread: no division by zero
    assert math.isfinite(k) and R.trust_weight(T([1.0], dtype=DOUBLE), k, b).item() == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------ the learned reward


def test_scores_do_not_depend_on_mode_batch_or_order():
    """PrefPaint's released reward keeps its dropout on while scoring; this one cannot."""
    model, batch = learned().train(), scene_prompts(5, 0, 6)
    images = batch.images.flip(0)
    whole = model(images, batch)
    assert not model.training and not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.features.parameters())
    halves = [model(images[i : i + 3], batch.select(slice(i, i + 3))) for i in (0, 3)]
    for name in ("value", "trust"):
        joined = torch.cat([getattr(h, name) for h in halves])
        assert torch.allclose(getattr(whole, name), joined, atol=1e-6)
    order = [3, 1, 5, 0, 2, 4]
    assert torch.allclose(model(images[order], batch.select(order)).value, whole.value[order], atol=1e-6)


def test_the_learned_reward_is_the_inner_product_of_features_and_psi():
    model, batch = learned(), scene_prompts(5, 0, 4)
    z = model.features(batch.images, batch.masked, batch.masks).double()
    scores = model(batch.images, batch)
    norm = model.ridge.norm(z)
    assert torch.allclose(scores.value.double(), z @ model.ridge.psi, atol=1e-6)
    assert torch.allclose(scores.parts["norm"].double(), norm, atol=1e-6)
    assert torch.allclose(scores.trust.double(), torch.exp(-1.5 * norm + 0.3), atol=1e-6)


def test_features_look_at_completion_masked_picture_and_mask():
    model, batch = learned(), scene_prompts(5, 0, 2)
    z = model.z(batch.images, batch)
    assert z.shape == (2, 5)
    assert not torch.allclose(z, model.z(batch.images.roll(1, 0), batch))
    other = Prompts(batch.images, batch.masks.flip(-1), batch.texts, batch.kinds, batch.scenes)
    assert not torch.allclose(z, model.z(batch.images, other))
    swapped = model.features(batch.masked, batch.images, batch.masks)
    assert not torch.allclose(z, swapped)


def test_features_pool_mean_and_maximum_over_the_hole_by_hand():
    """One stage of identity convolutions over a constant picture: the mean and the maximum over the hole are known."""
    tower = R.RewardFeatures(R.FeatureConfig(widths=(1,), dim=2))
    for i in (0, 2):
        torch.nn.init.dirac_(tower.stages[0][i].weight)
        torch.nn.init.zeros_(tower.stages[0][i].bias)
    with torch.no_grad():
        tower.project.weight.copy_(torch.eye(2))
        tower.project.bias.zero_()
    images = torch.full((1, 3, 4, 4), 0.5)
    images[0, 0, 0, 0], images[0, 0, 0, 1], images[0, 0, 3, 3] = 1.0, 0.75, 1.0  # the last lies outside the hole
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., 0, :] = 1
    z = tower(images, images, masks)  # channel 0 of the input is 2·red − 1: 1, ½, 0, 0 in the hole
    assert z[0].tolist() == pytest.approx([1.5 / 4, 1.0])


def identity_tower(channel, stages):
    """Convolutions that pass one input channel on; z is what was pooled."""
    tower = R.RewardFeatures(R.FeatureConfig(widths=(1,) * stages, dim=2 * stages))
    with torch.no_grad():
        for p in tower.parameters():
            p.zero_()
        for i, stage in enumerate(tower.stages):
            stage[0].weight[0, channel if i == 0 else 0, 1, 1] = stage[2].weight[0, 0, 1, 1] = 1
        tower.project.weight.copy_(torch.eye(2 * stages))
    return tower


def test_features_read_the_masked_picture_in_the_same_units():
    masked = torch.full((1, 3, 4, 4), 0.5)
    masked[0, 0, :, :2] = 0.75  # channel 3 of the input is 2·red − 1: ½ in half of the hole
    z = identity_tower(3, 1)(torch.zeros(1, 3, 4, 4), masked, torch.ones(1, 1, 4, 4))
    assert z[0].tolist() == pytest.approx([0.25, 0.5])


def test_a_picture_without_a_hole_has_finite_features():
    x = torch.rand(1, 3, 4, 4)
    assert torch.equal(identity_tower(0, 1)(x, x, torch.zeros(1, 1, 4, 4)), torch.zeros(1, 2))


def test_each_later_stage_sees_half_the_resolution():
    images = torch.full((1, 3, 4, 4), 0.5)
    images[0, 0, ::2, ::2] = 1.0  # the pixels that stride 2 keeps
    z = identity_tower(0, 2)(images, images, torch.ones(1, 1, 4, 4))
    assert z[0].tolist() == pytest.approx([0.25, 1.0, 1.0, 1.0])


def test_a_saved_reward_scores_as_before(tmp_path):
    model, batch = learned(), scene_prompts(5, 0, 4)
    with torch.no_grad():
        for p in model.features.parameters():
            p.copy_(p.half())  # stored in half precision
    model.save(tmp_path / "reward.pt", {})
    again = R.LearnedReward.load(tmp_path / "reward.pt")
    a, b = model(batch.images, batch), again(batch.images, batch)
    assert (
        torch.equal(a.value, b.value)
        and torch.equal(a.trust, b.trust)
        and torch.equal(a.parts["norm"], b.parts["norm"])
    )
    assert (again.k, again.b, again.ridge.lam) == (1.5, 0.3, 0.5) and again.norm_quantiles == {"0.5": 0.2, "0.99": 0.9}
    content = torch.load(tmp_path / "reward.pt", weights_only=True)
    del content["state"]["psi"]
    torch.save(content, tmp_path / "reward.pt")
    with pytest.raises(ValueError, match="not a whole reward model.*psi"):
        R.LearnedReward.load(tmp_path / "reward.pt")


# ------------------------------------------------------------------------------------------------ built-in rewards


def test_brightness_is_the_mean_luma():
    x = torch.zeros(4, 3, 2, 2)
    x[0, 0], x[1, 1], x[2, 2], x[3] = 1, 1, 1, 0.5
    x[3, :, 0, 0] = 1.0
    expected = [0.299, 0.587, 0.114, 0.625]
    assert R.brightness(x, scene_prompts(0, 0, 4)).tolist() == pytest.approx(expected)


def test_jpeg_size_is_in_kilobytes_and_noise_is_larger_than_a_flat_picture():
    x = torch.stack([torch.full((3, 32, 32), 0.5), torch.rand(3, 32, 32)])
    sizes = R.jpeg_size(x, scene_prompts(0, 0, 2))
    assert sizes[1] > 2 * sizes[0] and torch.equal(R.jpeg_small(x, scene_prompts(0, 0, 2)), -sizes)
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 128, np.uint8)).save(buffer, "JPEG", quality=95)
    assert sizes[0].item() == pytest.approx(len(buffer.getvalue()) / 1000)
    pixels, noisy = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(noisy, "JPEG", quality=95)
    y = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    y = torch.where(y == 1, 1.4, torch.where(y == 0, -0.3, y))  # beyond white is white, below black is black
    assert R.jpeg_size(y, scene_prompts(0, 0, 1)).item() == pytest.approx(len(noisy.getvalue()) / 1000)


def test_gold_is_seven_for_the_truth_and_needs_the_true_scene():
    batch = scene_prompts(0, 0, 3)
    assert R.gold(batch.images, batch).tolist() == pytest.approx([7.0] * 3)
    with pytest.raises(ValueError, match="true scenes"):
        R.gold(batch.images, Prompts(batch.images, batch.masks, batch.texts, batch.kinds))


class FakeClip:
    """Pictures and texts become the unit vectors that the test says."""

    logit_scale = torch.zeros(1)

    def encode_image(self, images):
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=-1)

    def encode_text(self, ids):
        return torch.nn.functional.one_hot(ids, 3).float()


class FakeTokenizer:
    def __call__(self, texts):
        return T([["red", "green", "blue"].index(t) for t in texts])

    def unknown(self, text):
        return [w for w in text.split() if w not in ("red", "green", "blue")]


def test_clip_reward_is_the_cosine_to_the_named_or_the_prompts_own_text():
    x = torch.zeros(2, 3, 2, 2)
    x[0, 0], x[1, 0], x[1, 1] = 1, 0.6, 0.8
    batch = Prompts(x, torch.ones(2, 1, 2, 2), ["red", "green"], ["full"] * 2)
    assert R.ClipReward(FakeClip(), FakeTokenizer(), "red")(x, batch).tolist() == pytest.approx([1.0, 0.6])
    assert R.ClipReward(FakeClip(), FakeTokenizer())(x, batch).tolist() == pytest.approx([1.0, 0.8])
    silent = Prompts(x, batch.masks, ["red", ""], batch.kinds)
    with pytest.raises(ValueError, match="without a text"):
        R.ClipReward(FakeClip(), FakeTokenizer())(x, silent)
    with pytest.raises(ValueError, match="never saw: dog"):
        R.ClipReward(FakeClip(), FakeTokenizer(), "red dog")


# ------------------------------------------------------------------------------------------------ choosing a reward


def load(name):
    return R.load_reward(name, learned=learned, clip=lambda: (FakeClip(), FakeTokenizer()))


def my_reward(images, batch):
    return images.mean((1, 2, 3)) + batch.masks.mean((1, 2, 3))


def test_a_reward_is_chosen_by_name():
    assert load("brightness") is R.brightness and load("jpeg_small") is R.jpeg_small and load("gold") is R.gold
    assert isinstance(load("model"), R.LearnedReward)
    assert load("clip: red").text == load("clip:red").text == "red"
    assert load(f"{__name__}:my_reward") is my_reward
    for name, message in (
        ("nonsense", "unknown; choose model, clip:TEXT, brightness"),
        ("no.such.module:f", "cannot be imported"),
        ("math:no_such_function", "cannot be imported"),
        ("math:pi", "is no function"),
        (":f", "cannot be imported"),
        ("2*nonsense+model", "term '2\\*nonsense'"),
        ("x*model", "term 'x\\*model'"),
    ):
        with pytest.raises(ValueError, match=message):
            load(name)


def test_a_module_beside_the_user_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_reward.py").write_text("def f(images, batch):\n    return images.mean((1, 2, 3))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p not in ("", str(tmp_path))])
    assert load("my_own_reward:f").__name__ == "f"


def test_a_weighted_sum_adds_its_terms_and_keeps_the_trust():
    batch = scene_prompts(5, 0, 3)
    x, model = torch.lerp(batch.images, torch.rand(3, 3, 32, 32), 0.3), learned()
    total = load("0.5*brightness+2*model+gold")(x, batch)
    expected = 0.5 * R.brightness(x, batch) + 2 * model(x, batch).value + R.gold(x, batch)
    assert torch.allclose(total.value, expected) and torch.equal(total.trust, model(x, batch).trust)
    assert set(total.parts) == {"norm"}
    mixed = load("clip: red+0.5*brightness")(x, batch)
    assert torch.allclose(mixed.value, load("clip: red")(x, batch) + 0.5 * R.brightness(x, batch))
    single = load("3*brightness")(x, batch)
    assert torch.allclose(single.value, 3 * R.brightness(x, batch)) and single.trust is None


@pytest.mark.parametrize(
    "answer,message",
    [
        (lambda x, b: torch.full((len(x),), math.nan), "NaN or infinity"),
        (lambda x, b: torch.arange(len(x)) / 0.0, "NaN or infinity"),
        (lambda x, b: torch.zeros(len(x), 1), r"returned \(3, 1\)"),
        (lambda x, b: 1.0, "returned float"),
        (lambda x, b: torch.full((len(x),), 2.5), "all 3 pictures the value 2.5"),
        (lambda x, b: 1 / 0, "raised ZeroDivisionError"),
    ],
    ids=["nan", "infinite", "shape", "number", "constant", "raises"],
)
def test_a_reward_that_cannot_be_learned_from_is_refused_by_name(answer, message):
    batch = scene_prompts(0, 0, 3)
    with pytest.raises(ValueError, match=f"reward mine: .*{message}"):
        R.CheckedReward("mine", answer)(batch.images, batch)


@pytest.mark.parametrize(
    "scores,message",
    [
        (R.Scores(torch.arange(3.0), T([1.0, math.nan, 1.0])), "a trust of NaN"),
        (R.Scores(torch.arange(3.0), torch.ones(3, 1)), r"a trust of \(3, 1\)"),
        (R.Scores(torch.arange(3.0), None, {"x": 1.0}), "a part 'x' of float"),
    ],
    ids=["nan trust", "trust of another shape", "part"],
)
def test_trust_and_parts_are_checked_too(scores, message):
    batch = scene_prompts(0, 0, 3)
    with pytest.raises(ValueError, match=f"reward mine: returned {message}"):
        R.CheckedReward("mine", lambda x, b: scores)(batch.images, batch)
    learning = T([1.0, 2.0, 3.0], requires_grad=True)
    assert not R.CheckedReward("mine", lambda x, b: R.Scores(learning, learning))(
        batch.images, batch
    ).trust.requires_grad


def test_a_term_of_a_sum_is_checked_by_its_own_name():
    batch = scene_prompts(0, 0, 3)
    with pytest.raises(ValueError, match=r"reward .*one_number: returned \(1,\)"):
        R.CheckedReward("sum", load(f"brightness+{__name__}:one_number"))(batch.images, batch)


def one_number(images, batch):
    return torch.ones(1)


def test_a_checked_reward_passes_good_answers_on():
    batch = scene_prompts(0, 0, 3)
    trust = T([1.0, 2.0, 3.0], dtype=DOUBLE)
    given = R.Scores(T([1, 2, 3]), trust, {"own": trust})
    scores = R.CheckedReward("mine", lambda x, b: given)(batch.images, batch)
    assert scores.value.tolist() == [1, 2, 3] and scores.value.dtype == torch.float32
    assert scores.trust.dtype == torch.float32 and scores.parts["own"].tolist() == [1, 2, 3]
    one = R.CheckedReward("mine", lambda x, b: torch.ones(1))(batch.images[:1], batch.select([0]))
    with pytest.raises(ValueError, match="all 2 pictures the value 1"):
        R.CheckedReward("mine", lambda x, b: torch.ones(2))(batch.images[:2], batch.select([0, 1]))
    answers = iter([T([1.0, 0.0, 0.0]), torch.ones(3)])
    last_differs = R.CheckedReward("mine", lambda x, b: T([2.0, 1.0, 1.0]))
    assert last_differs(batch.images, batch).value[0] == 2
    solved = R.CheckedReward("mine", lambda x, b: next(answers))
    assert solved(batch.images, batch).value.sum() == 1 and solved(batch.images, batch).value.sum() == 3  # all solved
    assert one.value.tolist() == [1] and one.trust is None  # a single picture cannot show a difference
