"""RPO's rewards and losses (Eqs. 4–8), by hand, by autograd and by counting."""

import math
import sys

import pytest
import torch

from minipref.losses import denoising_loss, preference_label, preference_loss, preference_margin
from minipref.rewards import ImageJudge, SubjectReward, arithmetic, harmonic, likeness, stripped

T = torch.tensor
DOUBLE = torch.float64


def values(seed=0, n=50):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# ------------------------------------------------------------------------------------------------ the reward


def test_the_papers_worked_check():
    """(I, T) = (0.9, 0.01) and (0.7, 0.21) at lambda one half; the arithmetic mean cannot tell them apart."""
    I, text = T([0.9, 0.7], dtype=DOUBLE), T([0.01, 0.21], dtype=DOUBLE)
    assert [round(v, 3) for v in harmonic(I, text, 0.5).tolist()] == [0.020, 0.323]
    assert arithmetic(I, text, 0.5).tolist() == pytest.approx([0.455, 0.455])


@pytest.mark.parametrize("lam", [0.3, 0.5, 0.7])
def test_the_harmonic_reward_is_equation_five_and_never_above_the_arithmetic(lam):
    I, text = values(0), values(1)
    h, a = harmonic(I, text, lam), arithmetic(I, text, lam)
    assert h.tolist() == pytest.approx([1 / (lam / i + (1 - lam) / t) for i, t in zip(I.tolist(), text.tolist())])
    assert a.tolist() == pytest.approx([lam * i + (1 - lam) * t for i, t in zip(I.tolist(), text.tolist())])
    assert (h < a).all() and torch.allclose(harmonic(I, I, lam), arithmetic(I, I, lam))
    assert (harmonic(I + 0.01, text, lam) > h).all() and (harmonic(I, text + 0.01, lam) > h).all()


def test_the_limits_of_lambda_and_of_likeness():
    I, text = values(0), values(1)
    assert torch.equal(harmonic(I, text, 1.0), I) and torch.equal(harmonic(I, text, 0.0), text)
    zero, one = T([0.0, 0.5, 0.0]), T([0.5, 0.0, 0.0])
    assert harmonic(zero, one, 0.5).tolist() == [0, 0, 0]
    assert arithmetic(zero, one, 0.25).tolist() == [0.375, 0.125, 0]
    for function in (harmonic, arithmetic):
        assert torch.equal(function(I, text, 1), I) and torch.equal(function(I, text, 0), text)
        for lam in (1.2, -0.2):
            with pytest.raises(ValueError, match=f"lam={lam}"):
                function(I, text, lam)


class FakeClip(torch.nn.Module):
    """Pictures of one brightness and texts of one length, on a circle: cosines are known."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))
        self.texts, self.pictures = [], 0

    def encode_image(self, x):
        self.pictures += len(x)
        angle = x.mean((1, 2, 3)) * math.pi
        return torch.stack([angle.cos(), angle.sin()], 1)

    def encode_text(self, ids):
        self.texts += ids.tolist()
        angle = ids[:, 0].float() * math.pi / 10
        return torch.stack([angle.cos(), angle.sin()], 1)


class FakeTokenizer:
    def __init__(self):
        self.seen = []

    def __call__(self, texts):
        self.seen += texts
        return T([[len(t.split())] for t in texts])


def picture(brightness, n=1):
    return torch.full((n, 3, 4, 4), float(brightness))


def test_likeness_is_the_mean_cosine_over_references_brought_to_zero_to_one():
    tokenizer = FakeTokenizer()
    reward = SubjectReward(FakeClip(), tokenizer, torch.cat([picture(0.0), picture(0.5)]))
    I, text = reward(torch.cat([picture(0.0), picture(1.0)]), ["a [V] b c d", "a [V] b c d"])
    assert I.tolist() == pytest.approx([((1 + 1) / 2 + (0 + 1) / 2) / 2, ((-1 + 1) / 2 + (0 + 1) / 2) / 2], abs=1e-6)
    four = math.cos(4 * math.pi / 10)  # "a b c d" has four words
    assert text.tolist() == pytest.approx([(four + 1) / 2, (-four + 1) / 2], abs=1e-6)


def test_rounding_leaves_likeness_between_zero_and_one():
    assert likeness(torch.tensor([-1.0000002, 1.0000002, 0.5])).tolist() == [0, 1, 0.75]


def test_the_subjects_token_never_reaches_the_scored_text():
    tokenizer = FakeTokenizer()
    reward = SubjectReward(FakeClip(), tokenizer, picture(0.5))
    reward(picture(0.2, 3), ["a [V] dog", "a  [V]  dog on a [V] mat", "[V]"])
    assert tokenizer.seen == ["", "a dog", "a dog on a mat"] and not any("[V]" in t for t in tokenizer.seen)
    assert stripped("a [V] square and a [V] star") == "a square and a star"


def test_references_are_encoded_once_and_batches_change_nothing():
    clip = FakeClip()
    reward = SubjectReward(clip, FakeTokenizer(), picture(0.5, 4), batch=3)
    x = torch.rand(7, 3, 4, 4)
    prompts = [f"a [V] {'b ' * i}" for i in range(7)]
    whole = reward(x, prompts)
    assert clip.pictures == 4 + 7
    single = [reward(x[i : i + 1], prompts[i : i + 1]) for i in range(7)]
    for k in (0, 1):
        assert torch.allclose(whole[k], torch.cat([s[k] for s in single]), atol=1e-6)
    with pytest.raises(ValueError, match="7 pictures but 6 prompts"):
        reward(x, prompts[:6])
    with pytest.raises(ValueError, match="no reference"):
        SubjectReward(clip, FakeTokenizer(), picture(0.5, 0))
    with pytest.raises(ValueError, match="no other to compare it with"):
        SubjectReward(clip, FakeTokenizer(), picture(0.5)).of_references(prompts)


def test_two_references_are_compared_with_each_other():
    reward = SubjectReward(FakeClip(), FakeTokenizer(), torch.cat([picture(0.1), picture(0.6)]))  # half a turn: cos 0
    assert reward.of_references(["a"])[0].flatten().tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_references_are_scored_under_every_prompt_without_being_encoded_again():
    clip = FakeClip()
    x = torch.cat([picture(0.1), picture(0.5), picture(0.8)])
    reward = SubjectReward(clip, FakeTokenizer(), x)
    prompts = ["a [V] b", "a b c [V] d e"]
    I, text = reward.of_references(prompts)
    assert clip.pictures == 3 and I.shape == text.shape == (3, 2)
    for j, p in enumerate(prompts):
        assert torch.allclose(text[:, j], reward(x, [p] * 3)[1], atol=1e-6)
        for i in range(3):  # each reference against the other two, never against itself
            others = SubjectReward(clip, FakeTokenizer(), torch.cat([x[:i], x[i + 1 :]]))
            assert torch.allclose(I[i, j], others(x[i : i + 1], [p])[0], atol=1e-6)


# ------------------------------------------------------------------------------------------------ a further judge


def bright_pixels(images):
    return (images > 0.5).flatten(1).int()


def no_embedding(images):
    return images.mean()


def raising(images):
    raise RuntimeError("mat1 and mat2")


def growing(images):
    return torch.ones(len(images), len(images))


def dark(images):
    return torch.zeros(len(images), 2)


def one_dark(images):
    """One picture without an embedding; every axis has one from another picture."""
    return torch.eye(2).repeat(len(images), 1)[: len(images)] * torch.tensor([0.0] + [1.0] * (len(images) - 1))[:, None]


def one_axis(images):
    """A good encoder that leaves an axis unused."""
    return torch.tensor([[1.0, 0.0]]).repeat(len(images), 1)


def test_a_further_encoder_gives_the_mean_cosine_of_pictures_and_references(monkeypatch):
    """Three references are the axes; pictures of ones have the cosine 1/√3 with each, however many there are."""
    monkeypatch.setitem(sys.modules, "my_encoder", sys.modules[__name__])
    judge = ImageJudge("my_encoder:bright_pixels", torch.eye(3)[:, None])
    for count in (2, 150):
        assert judge(torch.ones(count, 1, 3)) == pytest.approx(3**-0.5)
    assert judge(torch.tensor([[[1.0, 0, 0]], [[1, 1, 1]]])) == pytest.approx((1 / 3 + 3**-0.5) / 2)


@pytest.mark.parametrize(
    "encoder,said",
    [
        ("no_embedding", r"my_encoder:no_embedding: gave \(\), expected \(4, D\), finite and no row all zero"),
        ("raising", "my_encoder:raising: raised RuntimeError: mat1 and mat2"),
        ("dark", r"my_encoder:dark: gave \(4, 2\), expected \(4, D\), finite and no row all zero"),
        ("one_dark", r"my_encoder:one_dark: gave \(4, 2\), expected \(4, D\), finite and no row all zero"),
        ("nowhere", "my_encoder:nowhere: cannot be imported"),
    ],
)
def test_an_encoder_that_gives_no_embeddings_is_refused_by_name(monkeypatch, encoder, said):
    monkeypatch.setitem(sys.modules, "my_encoder", sys.modules[__name__])
    with pytest.raises(ValueError, match=said):
        ImageJudge(f"my_encoder:{encoder}", torch.ones(4, 3, 8, 8))


def test_an_encoder_may_leave_an_axis_unused(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_encoder", sys.modules[__name__])
    assert ImageJudge("my_encoder:one_axis", torch.ones(4, 3, 8, 8))(torch.ones(2, 3, 8, 8)) == pytest.approx(1)


def test_an_encoder_whose_embeddings_change_their_length_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_encoder", sys.modules[__name__])
    with pytest.raises(ValueError, match=r"gave \(64, 64\), expected \(64, 4\)"):
        ImageJudge("my_encoder:growing", torch.zeros(4, 3, 32, 32))
    judge = ImageJudge("my_encoder:growing", torch.zeros(64, 3, 32, 32))
    with pytest.raises(ValueError, match=r"gave \(3, 3\), expected \(3, 64\)"):
        judge(torch.zeros(3, 3, 32, 32))


# ------------------------------------------------------------------------------------------------ labels


def test_a_label_is_the_sigmoid_of_the_difference_of_rewards():
    ref, gen = T([0.7, 0.4]).double(), T([0.2, 0.6]).double()
    expected = [1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.2))]
    assert preference_label(ref, gen).tolist() == pytest.approx(expected)
    hot = [1 / (1 + math.exp(-5.0)), 1 / (1 + math.exp(2.0))]
    assert preference_label(ref, gen, temperature=0.1).tolist() == pytest.approx(hot)


def test_drawn_labels_come_as_often_as_their_probability_says():
    """200,000 draws at sigmoid(0.5); six standard errors: false alarm 2e-9."""
    n, p = 200_000, 1 / (1 + math.exp(-0.5))
    drawn = preference_label(torch.full((n,), 0.5), torch.zeros(n), generator=torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0.0, 1.0}
    assert abs(drawn.double().mean().item() - p) < 6 * math.sqrt(p * (1 - p) / n)


# ------------------------------------------------------------------------------------------------ the loss


def test_the_margin_is_the_improvement_on_the_reference_minus_that_on_the_generated_picture():
    theta_ref, base_ref, theta_gen, base_gen = (T([v]) for v in (1.0, 4.0, 2.0, 2.5))
    assert preference_margin(theta_ref, base_ref, theta_gen, base_gen).item() == (4 - 1) - (2.5 - 2)
    with pytest.raises(ValueError, match="shapes differ"):
        preference_margin(theta_ref, base_ref, theta_gen, torch.zeros(2))


@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_the_loss_starts_at_log_two_whatever_the_label(label):
    """Policy and base are the same model: the margin is 0."""
    x = torch.rand(6, 3, 4, 4)
    e = denoising_loss(x, x.flip(0))
    margin = preference_margin(e, e, e, e)
    assert preference_loss(margin, torch.full((6,), label), 0.7).item() == pytest.approx(math.log(2))


def test_the_logsigmoid_is_taken_per_pair_and_then_averaged():
    margin, label, beta = T([2.0, -1.0]).double(), T([0.25, 1.0]).double(), 0.5

    def one(m, y):
        return -(y * math.log(1 / (1 + math.exp(-beta * m))) + (1 - y) * math.log(1 / (1 + math.exp(beta * m))))

    assert preference_loss(margin, label, beta).item() == pytest.approx((one(2, 0.25) + one(-1, 1)) / 2)
    assert preference_loss(margin * 1e4, label, beta).isfinite()


def test_its_gradient_is_beta_times_sigmoid_minus_label():
    margin = values(0).sub(0.5).mul(4).requires_grad_()
    label, beta = values(1), 0.8
    preference_loss(margin, label, beta).backward()
    expected = beta * (1 / (1 + torch.exp(-beta * margin.detach())) - label) / len(margin)
    assert torch.allclose(margin.grad, expected, atol=1e-12)


def test_swapping_the_pair_and_its_label_changes_nothing():
    margin, label = values(0) - 0.5, values(1)
    assert preference_loss(margin, label, 0.8).item() == pytest.approx(preference_loss(-margin, 1 - label, 0.8).item())


def test_label_one_is_diffusion_dpo():
    """−log sigmoid(−½·b·[(m_w − m_l) − (ref_w − ref_l)]) (Wallace et al. 2023), our beta half of theirs."""
    m_w, ref_w, m_l, ref_l = (values(s) for s in range(4))
    b = 3.0
    expected = -torch.log(torch.sigmoid(-0.5 * b * ((m_w - m_l) - (ref_w - ref_l)))).mean()
    margin = preference_margin(m_w, ref_w, m_l, ref_l)
    assert preference_loss(margin, torch.ones(50, dtype=DOUBLE), b / 2).item() == pytest.approx(expected.item())
