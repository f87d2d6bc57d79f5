"""The rewards that `--reward` names."""

import io
import math

import numpy as np
import pytest
import torch
from helpers import learned
from PIL import Image

from minipref import named_rewards as R
from minipref.data.prompts import Prompts, scene_prompts
from minipref.rewards import LearnedReward

T = torch.tensor
DOUBLE = torch.float64


# ------------------------------------------------------------------------------------------------ built-in rewards


def test_brightness_is_the_mean_luma():
    x = torch.zeros(4, 3, 2, 2)
    x[0, 0], x[1, 1], x[2, 2], x[3] = 1, 1, 1, 0.5
    x[3, :, 0, 0] = 1.0
    expected = [0.299, 0.587, 0.114, 0.625]
    assert R.brightness(x, scene_prompts(0, 0, 4)).tolist() == pytest.approx(expected)


def test_a_reward_model_is_named_by_its_run_or_its_file(tmp_path):
    model, batch = learned(), scene_prompts(0, 0, 2)
    model.save(tmp_path / "reward.pt", {})
    for name in (f"model:{tmp_path}", f"model: {tmp_path / 'reward.pt'}"):
        named = R.load_reward(name, pytest.fail, pytest.fail)
        assert torch.allclose(named(batch.images, batch).value, model(batch.images, batch).value, atol=0.01)  # fp16


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
    assert isinstance(load("model"), LearnedReward)
    assert load("clip: red").text == load("clip:red").text == "red"
    assert load(f"{__name__}:my_reward") is my_reward
    for name, message in (
        ("nonsense", "unknown; choose model, model:RUN, clip:TEXT, brightness"),
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
    own = model(x, batch).parts
    assert set(total.parts) == {"norm", "trusted", "bound"} and torch.equal(total.parts["norm"], own["norm"])
    assert torch.allclose(total.parts["bound"], 2 * own["bound"])  # an error of the model counts twice
    assert torch.allclose(load("-2*model")(x, batch).parts["bound"], 2 * own["bound"])
    mixed = load("clip: red+0.5*brightness")(x, batch)
    assert torch.allclose(mixed.value, load("clip: red")(x, batch) + 0.5 * R.brightness(x, batch))
    single = load("3*brightness")(x, batch)
    assert torch.allclose(single.value, 3 * R.brightness(x, batch)) and single.trust is None
    with pytest.raises(ValueError, match=r"'brightness - 2' is no number; join terms by \+"):
        load("brightness - 2*jpeg_size")


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
