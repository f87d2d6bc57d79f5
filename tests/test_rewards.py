"""The rewards that `--reward` names."""

import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import learned
from PIL import Image

from minipref import rewards as R
from minipref.data.prompts import Prompts
from minipref.reward_model import LearnedReward, Scores
from minipref.toy.raters import gold_reward
from minipref.toy.world import scene_prompts

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
    model, prompts = learned(), scene_prompts(0, 0, 2)
    model.save(tmp_path / "reward.pt", {})
    own, others = SimpleNamespace(folder=tmp_path), SimpleNamespace(folder=tmp_path / "nowhere")
    expected = model(prompts.images, prompts).value
    for name, pipe in ((f"model:{tmp_path}", others), (f"model: {tmp_path / 'reward.pt'}", others), ("model", own)):
        named = R.load_reward(name, pipe)
        assert torch.allclose(named(prompts.images, prompts).value, expected, atol=0.01)  # fp16


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
    prompts = Prompts(x, torch.ones(2, 1, 2, 2), ["red", "green"], ["full"] * 2)
    assert R.ClipReward(FakeClip(), FakeTokenizer(), "red")(x, prompts).tolist() == pytest.approx([1.0, 0.6])
    assert R.ClipReward(FakeClip(), FakeTokenizer())(x, prompts).tolist() == pytest.approx([1.0, 0.8])
    silent = Prompts(x, prompts.masks, ["red", ""], prompts.kinds)
    with pytest.raises(ValueError, match="without a text"):
        R.ClipReward(FakeClip(), FakeTokenizer())(x, silent)
    with pytest.raises(ValueError, match="never saw: dog"):
        R.ClipReward(FakeClip(), FakeTokenizer(), "red dog")


# ------------------------------------------------------------------------------------------------ choosing a reward


@pytest.fixture
def load(tmp_path):
    """-> load_reward for a pipeline with a reward model and FakeClip; "gold" is known, as train_rl.py knows it."""
    learned().save(tmp_path / "reward.pt", {})
    pipeline = SimpleNamespace(folder=tmp_path, clip=FakeClip(), tokenizer=FakeTokenizer())
    return lambda name: R.load_reward(name, pipeline, {"gold": gold_reward})


def my_reward(images, prompts):
    return images.mean((1, 2, 3)) + prompts.masks.mean((1, 2, 3))


def test_a_reward_is_chosen_by_name(load):
    assert load("brightness").reward is R.brightness and load("jpeg_small").reward is R.jpeg_small
    assert load("gold").reward is gold_reward and load("brightness").name == "brightness"
    assert isinstance(load("model").reward, LearnedReward)
    assert load("clip: red").reward.text == load("clip:red").reward.text == "red"
    assert load(f"{__name__}:my_reward").reward is my_reward
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


def test_gold_is_a_reward_only_where_it_is_offered_and_the_true_scene_is_known(load):
    prompts = scene_prompts(0, 0, 3)
    x = prompts.paste_known(torch.lerp(prompts.images, torch.rand(3, 3, 32, 32), T([0.0, 0.5, 1.0]).view(3, 1, 1, 1)))
    assert load("gold")(x, prompts).value[0] == pytest.approx(7.0)
    own = Prompts(prompts.images, prompts.masks, prompts.texts, prompts.kinds)
    with pytest.raises(
        ValueError, match="^reward gold: .*true scenes of the toy world; pictures of your own have none"
    ):
        load("gold")(x, own)
    with pytest.raises(ValueError, match="^--reward gold: unknown; choose "):
        R.load_reward("gold", SimpleNamespace())


def test_every_loaded_reward_is_checked(load):
    """Alone as in a sum, whoever made it: what cannot be learned from is refused by its name."""
    prompts = scene_prompts(5, 0, 3)
    for name in (f"{__name__}:one_number", f"brightness+{__name__}:one_number", f"2*{__name__}:one_number"):
        with pytest.raises(ValueError, match=rf"^reward .*{__name__}:one_number: returned \(1,\)"):
            load(name)(prompts.images, prompts)
    with pytest.raises(ValueError, match="^reward brightness: gave all 3 pictures the value 0: nothing to learn"):
        load("brightness")(torch.zeros(3, 3, 32, 32), prompts)


def test_a_module_beside_the_user_is_found(load, tmp_path, monkeypatch):
    (tmp_path / "my_own_reward.py").write_text("def f(images, prompts):\n    return images.mean((1, 2, 3))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p not in ("", str(tmp_path))])
    assert load("my_own_reward:f").reward.__name__ == "f"


def test_a_weighted_sum_adds_its_terms_and_keeps_the_trust(load):
    prompts = scene_prompts(5, 0, 3)
    x, model = torch.lerp(prompts.images, torch.rand(3, 3, 32, 32), 0.3), load("model").reward
    total = load("0.5*brightness+2*model+gold")(x, prompts)
    expected = 0.5 * R.brightness(x, prompts) + 2 * model(x, prompts).value + gold_reward(x, prompts)
    assert torch.allclose(total.value, expected) and torch.equal(total.trust, model(x, prompts).trust)
    own = model(x, prompts).parts
    assert set(total.parts) == {"norm", "trusted", "bound"} and torch.equal(total.parts["norm"], own["norm"])
    assert torch.allclose(total.parts["bound"], 2 * own["bound"])  # an error of the model counts twice
    assert torch.allclose(load("-2*model")(x, prompts).parts["bound"], 2 * own["bound"])
    mixed = load("clip: red+0.5*brightness")(x, prompts)
    assert torch.allclose(mixed.value, load("clip: red")(x, prompts).value + 0.5 * R.brightness(x, prompts))
    single = load("3*brightness")(x, prompts)
    assert torch.allclose(single.value, 3 * R.brightness(x, prompts)) and single.trust is None
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
    prompts = scene_prompts(0, 0, 3)
    with pytest.raises(ValueError, match=f"reward mine: .*{message}"):
        R.CheckedReward("mine", answer)(prompts.images, prompts)


@pytest.mark.parametrize(
    "scores,message",
    [
        (Scores(torch.arange(3.0), T([1.0, math.nan, 1.0])), "a trust of NaN"),
        (Scores(torch.arange(3.0), torch.ones(3, 1)), r"a trust of \(3, 1\)"),
        (Scores(torch.arange(3.0), None, {"x": 1.0}), "a part 'x' of float"),
    ],
    ids=["nan trust", "trust of another shape", "part"],
)
def test_trust_and_parts_are_checked_too(scores, message):
    prompts = scene_prompts(0, 0, 3)
    with pytest.raises(ValueError, match=f"reward mine: returned {message}"):
        R.CheckedReward("mine", lambda x, b: scores)(prompts.images, prompts)
    learning = T([1.0, 2.0, 3.0], requires_grad=True)
    assert not R.CheckedReward("mine", lambda x, b: Scores(learning, learning))(
        prompts.images, prompts
    ).trust.requires_grad


def one_number(images, prompts):
    return torch.ones(1)


def test_a_checked_reward_passes_good_answers_on():
    prompts = scene_prompts(0, 0, 3)
    trust = T([1.0, 2.0, 3.0], dtype=DOUBLE)
    given = Scores(T([1, 2, 3]), trust, {"own": trust})
    scores = R.CheckedReward("mine", lambda x, b: given)(prompts.images, prompts)
    assert scores.value.tolist() == [1, 2, 3] and scores.value.dtype == torch.float32
    assert scores.trust.dtype == torch.float32 and scores.parts["own"].tolist() == [1, 2, 3]
    one = R.CheckedReward("mine", lambda x, b: torch.ones(1))(prompts.images[:1], prompts.select([0]))
    with pytest.raises(ValueError, match="all 2 pictures the value 1"):
        R.CheckedReward("mine", lambda x, b: torch.ones(2))(prompts.images[:2], prompts.select([0, 1]))
    answers = iter([T([1.0, 0.0, 0.0]), torch.ones(3)])
    last_differs = R.CheckedReward("mine", lambda x, b: T([2.0, 1.0, 1.0]))
    assert last_differs(prompts.images, prompts).value[0] == 2
    solved = R.CheckedReward("mine", lambda x, b: next(answers))
    assert (
        solved(prompts.images, prompts).value.sum() == 1 and solved(prompts.images, prompts).value.sum() == 3
    )  # all solved
    assert one.value.tolist() == [1] and one.trust is None  # a single picture cannot show a difference
