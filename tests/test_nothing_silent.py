"""What would falsify a result does not pass in silence: rewards that change what they judge, code that leaves, sums of
bounds, pictures and masks that programs write in different ways, checkpoints that only seem whole."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from helpers import learned, stops_with, train_tiny
from PIL import Image

from minipref import rewards
from minipref.data import pictures, rating_files
from minipref.data.prompts import prompt_seed
from minipref.pipeline import SHIPPED, load_clip, load_unet
from minipref.reward_model import LearnedReward, Scores
from minipref.rewards import CheckedReward, ImageJudge, foreign_code, load_reward
from minipref.runtime.config import Steady, run_main
from minipref.toy import raters
from minipref.toy.world import scene_prompts


def prompts_of(count=6):
    return scene_prompts(3, 0, count)


MEDDLING = {
    "images darker": lambda x, p: x.sub_(0.45),
    "images clamped": lambda x, p: x.clamp_(0.4, 0.6),
    "images resized": lambda x, p: x.resize_(1),
    "masks full": lambda x, p: p.masks.fill_(1),
    "originals black": lambda x, p: p.images.zero_(),
    "texts": lambda x, p: p.texts.__setitem__(0, "another"),
    "kinds": lambda x, p: p.kinds.clear(),
    "truth": lambda x, p: p.truth.reverse(),
}


@pytest.mark.parametrize("meddle", MEDDLING.values(), ids=MEDDLING)
@pytest.mark.parametrize("batch_size", [2, 64])
def test_a_reward_cannot_change_what_it_judges(meddle, batch_size):
    def mine(x, p):
        value = x.mean((1, 2, 3))
        meddle(x, p)
        return value

    images, prompts, twin = prompts_of().images, prompts_of(), prompts_of()
    CheckedReward("mine", mine, batch_size)(images, prompts)
    assert torch.equal(images, twin.images) and torch.equal(prompts.images, twin.images)
    assert torch.equal(prompts.masks, twin.masks) and prompts.truth == twin.truth
    assert prompts.texts == twin.texts and prompts.kinds == twin.kinds


def test_a_term_of_a_sum_does_not_falsify_the_others(monkeypatch, tmp_path):
    code = (
        "def f(images, prompts):\n    value = images.mean((1, 2, 3))\n    images.zero_()\n    prompts.masks.fill_(1)\n"
    )
    (tmp_path / "greedy_module.py").write_text(code + "    return value\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    prompts = prompts_of()
    for name in ("greedy_module:f+brightness", "brightness+greedy_module:f"):
        value = load_reward(name, None)(prompts.images, prompts).value
        mean = prompts_of().images.mean((1, 2, 3))
        assert torch.allclose(value, rewards.brightness(prompts_of().images, prompts) + mean)


# ------------------------------------------------------------------------------------------------ code that leaves

LEAVING = [SystemExit(0), SystemExit("done"), SystemExit(3), GeneratorExit(), RuntimeError("x"), MemoryError()]


@pytest.mark.parametrize("how", LEAVING, ids=repr)
def test_a_reward_that_leaves_is_an_error(how, capsys):
    def mine(x, p):
        raise how

    stops_with(lambda: CheckedReward("mine", mine)(prompts_of().images, prompts_of()), "reward mine: raised", capsys)


@pytest.mark.parametrize("line", ["sys.exit(0)", "raise SystemExit", "exit()", "quit(0)"])
def test_a_module_that_leaves_is_an_error(line, tmp_path, monkeypatch, capsys):
    (tmp_path / "leaving.py").write_text(f"import sys\n{line}\ndef f(*x): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("leaving:f", "brightness+leaving:f"):
        stops_with(lambda n=name: load_reward(n, None), "leaving:f: cannot be imported (SystemExit", capsys)
    stops_with(lambda: ImageJudge("leaving:f", None), "--image-encoder leaving:f: cannot be imported", capsys)
    sys.modules.pop("leaving", None)


def test_ctrl_c_in_a_reward_still_ends_the_run():
    with pytest.raises(KeyboardInterrupt), foreign_code():
        raise KeyboardInterrupt


@pytest.mark.parametrize("lines", ["import sys; sys.exit(0)", "raise SystemExit", "quit()"])
def test_an_answer_that_leaves_is_not_right(lines, tmp_path):
    import run

    (tmp_path / "mine.py").write_text(lines)
    path, exercise = run.find(1), run.Fence(f"{run.YOURS}\na = 1\n{run.CHECK}\nassert a\n", 1, "exercise", 1)
    with pytest.raises(run.Left, match="is no answer"):
        run.attempt(exercise, lines, {"__name__": "tutorial"}, path, tmp_path / "mine.py")


# ------------------------------------------------------------------------------------------------ how many at a time


@pytest.mark.parametrize("batch_size,expected", [(4, [4, 4, 2]), (10, [10]), (3, [3, 3, 3, 1]), (1, [1] * 10)])
def test_a_reward_is_given_so_many_pictures_at_a_time(batch_size, expected):
    sizes = []

    def mine(x, p):
        sizes.append((len(x), len(p), len(p.texts)))
        return Scores(x.mean((1, 2, 3)), x.mean((1, 2, 3)), {"own": p.masks.mean((1, 2, 3))})

    prompts = prompts_of(10)
    scores = CheckedReward("mine", mine, batch_size)(prompts.images, prompts)
    assert sizes == [(n, n, n) for n in expected]
    assert torch.allclose(scores.value, prompts.images.mean((1, 2, 3))) and torch.equal(scores.value, scores.trust)
    assert torch.allclose(scores.parts["own"], prompts.masks.mean((1, 2, 3)))


def test_what_was_tried_before_the_start_is_never_exceeded(tmp_path, monkeypatch):
    """In a whole run; and a reward whose memory is smaller dies before anything is written."""
    code = "sizes = []\nmost = 99\ndef f(images, prompts):\n    sizes.append(len(images))\n"
    code += "    if len(images) > most: raise MemoryError\n    return images.mean((1, 2, 3))\n"
    (tmp_path / "counting_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    train_tiny(tmp_path / "run", monkeypatch, epochs=1, reward="counting_module:f", reward_batch=5, win_prompts=16)
    module = sys.modules["counting_module"]
    assert module.sizes[0] == 5 == max(module.sizes)
    module.most = 20
    with pytest.raises(ValueError, match="counting_module:f: raised MemoryError"):
        train_tiny(tmp_path / "other", monkeypatch, epochs=1, reward="counting_module:f", reward_batch=21)
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------------------ sums and bounds


def test_bounds_of_a_sum_add_with_their_weights_and_trust_is_a_conjunction(tmp_path):
    prompts = prompts_of(12)
    images = torch.lerp(prompts.images, torch.rand(12, 3, 32, 32), 0.5)
    models = []
    for i in range(2):
        norm = learned(seed=i)(images, prompts).parts["norm"]  # half of the pictures are trusted
        model = learned(seed=i, norm_quantiles={"0.5": 0.2, "0.99": float(norm.median())})
        model.save(tmp_path / f"{i}.pt", {})
        models.append(LearnedReward.load(tmp_path / f"{i}.pt")(images, prompts))
    a, b = (m.parts for m in models)
    for wa, wb in ((2.0, -3.0), (-0.5, 1.0), (1.0, 0.0)):
        total = load_reward(f"{wa}*model:{tmp_path}/0.pt+{wb}*model:{tmp_path}/1.pt+brightness", None)(images, prompts)
        assert torch.allclose(total.parts["bound"], abs(wa) * a["bound"] + abs(wb) * b["bound"])
        assert torch.equal(total.parts["trusted"], a["trusted"] * b["trusted"]) and "norm" not in total.parts
    assert 0 < total.parts["trusted"].mean() < min(a["trusted"].mean(), b["trusted"].mean()) + 1e-6


@pytest.mark.parametrize("delta", [0.5, 0.05, 1e-4])
def test_delta_reaches_the_bounds_of_the_scores(delta, tmp_path):
    prompts = prompts_of(4)
    learned(delta=delta).save(tmp_path / "reward.pt", {})
    model = LearnedReward.load(tmp_path / "reward.pt")
    parts = model(prompts.images, prompts).parts
    assert torch.allclose(parts["bound"], (model.bound_factor(delta) * parts["norm"]).float(), rtol=1e-4)
    assert delta == 0.05 or not torch.allclose(parts["bound"], model.bound_factor(0.05) * parts["norm"], rtol=1e-3)


@pytest.mark.parametrize("one,other", [((0, 1), (1, 0)), ((5, 500), (505, 0)), ((0, 1000), (999, 1))])
def test_no_two_rounds_repeat_the_raters_noise(one, other, monkeypatch, tmp_path):
    """Of neighbouring seeds and starts, whose sums are equal."""
    seeds = []
    monkeypatch.setattr(raters, "rate", lambda x, m, t, g: seeds.append(g.initial_seed()) or [])
    monkeypatch.setattr(rating_files, "write", lambda *a, **k: None)
    prompts = prompts_of(2)
    for seed, start in (one, other):
        raters.rate_completions(tmp_path, prompts, prompts.images, seed=seed, start=start, widened=False)
    assert prompt_seed("rating", one[0]) + one[1] == prompt_seed("rating", other[0]) + other[1]
    assert seeds[0] != seeds[1]


# ------------------------------------------------------------------------------------------------ pictures

SCORES = {"structure": 5, "texture": 6, "overall": 5}


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pictures_that_a_camera_turned_are_rated_like_others(orientation, tmp_path):
    """A wide picture whose file holds it upright, or the other way round, beside an untagged mask."""
    exif, shape = Image.Exif(), (48, 32) if orientation in (6, 8) else (32, 48)
    exif[0x0112] = orientation
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)).save(
        tmp_path / "x.png", exif=exif
    )
    Image.new("L", (48, 32), 255).save(tmp_path / "m.png")
    assert pictures.picture_size(tmp_path / "x.png") == (32, 48)
    row = {"image": "x.png", "masked": "x.png", "mask": "m.png", "prompt_id": "a", "scores": SCORES}
    (tmp_path / "ratings.jsonl").write_text(json.dumps(row))
    rated, problems = rating_files.load(tmp_path, 32)
    assert len(rated) == 1 and not problems


def test_masks_are_read_as_programs_write_them(tmp_path):
    hole = np.zeros((32, 32), np.uint8)
    hole[:, 16:] = 1
    ways = {
        "zeros and ones": Image.fromarray(hole), "black and white": Image.fromarray(hole * 255),
        "one bit": Image.fromarray(hole * 255).convert("1"), "colour": Image.fromarray(hole * 255).convert("RGB"),
        "opaque": Image.fromarray(hole * 255).convert("RGBA"),
        "sixteen bits": Image.fromarray(hole.astype(np.uint16) * 65535),
    }  # fmt: skip
    for name, picture in ways.items():
        picture.save(tmp_path / "m.png")
        mask = pictures.read_mask(tmp_path / "m.png", (32, 32), 32)
        assert torch.equal(mask, torch.from_numpy(hole).float()[None]), name


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0)])
def test_a_mask_with_transparent_parts_is_refused_whichever_way_it_means(colour, tmp_path):
    picture = Image.new("RGBA", (32, 32), (*colour, 255))
    picture.paste((255 - colour[0],) * 3 + (0,), (0, 0, 16, 32))
    for change in (picture, picture.quantize(), picture.convert("LA")):
        change.save(tmp_path / "m.png")
        with pytest.raises(ValueError, match="m.png: the mask has transparent parts"):
            pictures.read_mask(tmp_path / "m.png", (32, 32), 32)


def test_folders_of_pictures_leave_out_what_is_hidden_and_enter_links_once(tmp_path):
    folder = tmp_path / "pictures"
    for name in (".ipynb_checkpoints", "deep/er", ".hidden/deep"):
        (folder / name).mkdir(parents=True)
    (tmp_path / "linked").mkdir()
    read = ("a.jfif", "b.jpe", "c.JPG", "deep/er/d.jpeg")
    for name in (*read, ".ipynb_checkpoints/a.jpg", "._a.jpg", ".hidden/deep/x.jpg", "../linked/e.jpg"):
        Image.new("RGB", (8, 8), "red").save(folder / name, "JPEG")
    (folder / "link").symlink_to(tmp_path / "linked")
    (folder / "deep" / "back").symlink_to(folder)
    (folder / "loop").symlink_to("loop")
    _, files, skipped = pictures.read_folder(folder, 8)
    assert sorted(str(f.relative_to(folder)) for f in files) == sorted([*read, "link/e.jpg"]) and not skipped


@pytest.mark.parametrize("break_", ["\u2028", "\u2029", "\x85"])
def test_a_line_of_json_ends_at_a_newline_only(break_, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "x.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "m.png")
    row = {"image": "x.png", "masked": "x.png", "mask": "m.png", "prompt_id": f"a{break_}b", "scores": SCORES}
    (tmp_path / "ratings.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    rows, problems = rating_files.scan(tmp_path)
    assert len(rows) == 1 and not problems and rows[0].prompt_id == f"a{break_}b"


def test_windows_separators_are_accepted(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "x.png")
    row = {"image": "images\\x.png", "masked": ".\\images\\x.png", "prompt_id": "a", "scores": SCORES}
    (tmp_path / "ratings.jsonl").write_text(json.dumps(row))
    rows, problems = rating_files.scan(tmp_path)
    assert not problems and rows[0].image == tmp_path / "images" / "x.png"


# ------------------------------------------------------------------------------------------------ checkpoints, streams


@pytest.mark.parametrize("words", [["red"], [], None, "red", [1, 2], ["red"] * 300, {"red": 1}], ids=str)
def test_a_list_of_words_must_fit_the_vocabulary(words, tmp_path):
    content = torch.load(SHIPPED / "clip.pt", weights_only=True)
    content["meta"]["words"] = words
    torch.save(content, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="clip.pt: "):
        load_clip(tmp_path / "clip.pt")


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_weights_are_real_numbers(kind, tmp_path):
    content = torch.load(SHIPPED / "unet.pt", weights_only=True)
    content["state"]["conv_out.bias"] = content["state"]["conv_out.bias"].to(kind)
    torch.save(content, tmp_path / "unet.pt")
    with pytest.raises(ValueError, match="unet.pt: weights of another configuration .*conv_out.bias"):
        load_unet(tmp_path / "unet.pt")


@pytest.mark.parametrize("answer", [list, tuple, torch.Tensor.numpy, torch.Tensor.double, lambda x: x.tolist()])
def test_rewards_may_return_lists_and_arrays(answer):
    prompts = prompts_of()
    scores = CheckedReward("mine", lambda x, p: answer(x.mean((1, 2, 3))))(prompts.images, prompts)
    assert torch.allclose(scores.value, prompts.images.mean((1, 2, 3))) and scores.value.dtype == torch.float32


BUFFER = torch.zeros(64)


def reused(x, p):
    part = BUFFER[: len(x)]
    return part.copy_(x.mean((1, 2, 3)))


def reused_array(x, p):
    part = BUFFER.numpy()[: len(x)]
    part[:] = x.mean((1, 2, 3)).numpy()
    return part


@pytest.mark.parametrize("reward", [reused, reused_array])
def test_a_reward_may_use_its_buffer_again(reward):
    found = CheckedReward("mine", reward, 2)(prompts_of().images, prompts_of()).value
    assert torch.allclose(found, prompts_of().images.mean((1, 2, 3)))


ODD_ANSWERS = {
    "a list of tensors that learn": lambda v: [x.clone().requires_grad_() for x in v],
    "an array of the other byte order": lambda v: v.numpy().astype(">f8"),
    "a reversed array": lambda v: v.flip(0).numpy()[::-1],
    "no parts": lambda v: Scores(v, None, None),
    "integers": lambda v: (1000 * v).int(),
}
WRONG_ANSWERS = {
    "sparse": (lambda v: v.to_sparse(), "returned torch.float32, torch.sparse_coo; expected 6 finite real numbers"),
    "complex": (lambda v: v + 0j, "returned torch.complex64, torch.strided; expected"),
    "complex list": (lambda v: [complex(x) for x in v], "returned list; expected"),
    "meta": (lambda v: v.to("meta"), "returned (6,); expected"),
    "quantized": (
        lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8).reshape(2, 3),
        "returned (2, 3); expected",
    ),
    "nested": (lambda v: torch.nested.nested_tensor([v, v[:2]]), "expected 6 finite real numbers"),
    "text": (lambda v: ["good"] * len(v), "returned list; expected"),
    "too large for single precision": (lambda v: v.double() * 1e39, "NaN or infinity"),
    "so large that its square is none": (lambda v: v * 1e20, "numbers beyond 1e+15"),
    "a trust below 0": (lambda v: Scores(v, -torch.ones(6)), "a trust below 0"),
    "a trust of NaN": (lambda v: Scores(v, torch.full((6,), torch.nan)), "a trust of NaN"),
}


@pytest.mark.parametrize("answer", ODD_ANSWERS.values(), ids=ODD_ANSWERS)
def test_odd_answers_of_a_reward_are_read(answer):
    mean = prompts_of().images.mean((1, 2, 3))
    found = CheckedReward("mine", lambda x, p: answer(mean), 64)(prompts_of().images, prompts_of()).value
    expected = (1000 * mean).int().float() if answer is ODD_ANSWERS["integers"] else mean
    assert found.dtype == torch.float32 and torch.allclose(found, expected)


@pytest.mark.parametrize("answer,message", WRONG_ANSWERS.values(), ids=WRONG_ANSWERS)
def test_wrong_answers_of_a_reward_are_one_line(answer, message, capsys):
    mean = prompts_of().images.mean((1, 2, 3))
    reward = CheckedReward("mine", lambda x, p: answer(mean), 64)
    stops_with(lambda: reward(prompts_of().images, prompts_of()), message, capsys)


def test_an_error_that_cannot_say_what_it_is_is_one_line(capsys):
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    def mine(x, p):
        raise Mute

    reward = CheckedReward("mine", mine, 64)
    stops_with(lambda: reward(prompts_of().images, prompts_of()), "raised Mute: it does not say what", capsys)


def test_a_sum_of_terms_may_name_numbers_and_folders_with_a_plus(tmp_path, monkeypatch):
    images, prompts = prompts_of().images, prompts_of()
    found = load_reward("1e+1*brightness+-2.5E+1*brightness", None)(images, prompts).value
    assert torch.allclose(found, -15 * rewards.brightness(images, prompts), atol=1e-5)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b").mkdir()
    learned(0).save("a+b/reward.pt", {})
    found, expected = load_reward("model:a+b", None)(images, prompts).value, learned(0)(images, prompts).value
    assert torch.allclose(found, expected, atol=1e-3)  # features are stored in half precision
    with pytest.raises(ValueError, match="numbers beyond 1e.15"):
        load_reward("1e38*brightness", None)(images, prompts)


def test_an_image_encoder_is_tried_on_as_many_pictures_as_it_ever_gets(monkeypatch, tmp_path):
    code = "def few(x):\n    assert len(x) <= 32, 'out of room'\n    return x.flatten(1)\n"
    code += "def unreal(x):\n    return x.flatten(1) + 0j\n"
    (tmp_path / "encoder_of_few.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="raised AssertionError: out of room"):
        ImageJudge("encoder_of_few:few", prompts_of(4).images)
    with pytest.raises(ValueError, match="gave Tensor|gave ..., 3072., expected|gave .4, 3072., expected"):
        ImageJudge("encoder_of_few:unreal", prompts_of(4).images)


def test_what_two_links_lead_to_counts_once(tmp_path):
    """Else a picture could be trained on and held out."""
    (tmp_path / "B" / "C").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "B" / f"{i}.png")
    Image.new("RGB", (8, 8), (9, 0, 0)).save(tmp_path / "B" / "C" / "9.png")
    for name, goal in (("A", "B"), ("Z", "B"), ("M", "B/C"), ("again.png", "B/1.png"), ("B/D", "C")):
        (tmp_path / name).symlink_to(tmp_path / goal if "/" not in name else goal)
    images, files, _ = pictures.read_folder(tmp_path, 8)
    assert len(images) == len(files) == 4 and len({float(x.sum()) for x in images}) == 4


@pytest.mark.parametrize("dtype,value", [(np.uint16, 1), (np.uint16, 65535), (np.uint8, 1), (np.uint8, 255)])
def test_a_mask_of_zeros_and_ones_may_have_any_depth(dtype, value, tmp_path):
    hole = np.zeros((16, 16), dtype)
    hole[4:8] = value
    Image.fromarray(hole).save(tmp_path / "m.png")
    assert pictures.read_mask(tmp_path / "m.png", (16, 16), 16).sum() == 4 * 16


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_broken_exif_turns_nothing(kind, tmp_path):
    Image.new("RGB", (12, 8), (0, 200, 0)).save(tmp_path / "x", kind, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert pictures.picture_size(tmp_path / "x") == (8, 12)
    assert pictures.read_image(tmp_path / "x", 8).shape == (3, 8, 8)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_printing_never_ends_a_run(encoding, monkeypatch):
    raw = io.BytesIO()
    for stream in (io.TextIOWrapper(raw, encoding, write_through=True), None):
        monkeypatch.setattr(sys, "stdout", stream)
        run_main("p", lambda: print("‖z‖ → zwölf \udcff 猫"))
    assert b"zw" in raw.getvalue()
    closed = io.StringIO()
    closed.close()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, closed)
    with pytest.raises(SystemExit) as stop:
        run_main("p", lambda: (print("x"), int("x")))
    assert stop.value.code == 2 and not Steady(closed).isatty()
