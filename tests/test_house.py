"""The house keeps its order: checkpoints, run folders, pictures that people bring."""

import ast
import dataclasses
import json
import platform
import types
from pathlib import Path

import mutate
import numpy as np
import pytest
import torch
from PIL import Image

import minipref
from minipref.data import pictures
from minipref.models.unet import UNet, UNetConfig
from minipref.runs import read_config
from minipref.runtime import checkpoint
from minipref.runtime.runlog import RunFolder, progress

ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------------------------------------ checkpoints

TINY = UNetConfig(
    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(4,), layers_per_block=1,
    cross_attention_dim=4, attention_head_dim=1, norm_num_groups=2,
)  # fmt: skip


def test_a_checkpoint_returns_what_was_saved(tmp_path):
    unet = UNet(TINY)
    state = unet.state_dict() | {"exact": torch.tensor([1 / 3], dtype=torch.float64)}
    checkpoint.save(tmp_path / "a" / "u.pt", "unet", TINY, state, meta={"seed": 3})
    config, again, meta = checkpoint.load(tmp_path / "a" / "u.pt", "unet")
    assert meta == {"seed": 3} and all(torch.equal(again[k], v) for k, v in state.items()) and len(again) == len(state)
    del again["exact"]
    built = checkpoint.build(UNetConfig, UNet, config, again, "u.pt")
    assert built.config == TINY and not built.training
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["u.pt"]


def test_half_precision_is_widened_on_loading(tmp_path):
    checkpoint.save(tmp_path / "u.pt", "unet", {}, {"x": torch.tensor([1 / 3])}, dtype=torch.float16)
    _, state, _ = checkpoint.load(tmp_path / "u.pt", "unet")
    assert state["x"].dtype == torch.float32 and state["x"].item() == torch.tensor(1 / 3).half().item()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fails(p):
        p.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.atomic_write(path, fails)
    assert path.read_text(encoding="utf-8") == "old" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_a_bad_checkpoint_is_named_with_its_fault(tmp_path):
    path = tmp_path / "u.pt"
    with pytest.raises(FileNotFoundError, match="u.pt: no such checkpoint"):
        checkpoint.load(path, "unet")
    checkpoint.save(path, "unet", TINY, UNet(TINY).state_dict())
    with pytest.raises(ValueError, match="holds a unet, expected a reward"):
        checkpoint.load(path, "reward")
    whole = path.read_bytes()
    checkpoint.save(path, "unet", TINY, checkpoint.load(path, "unet")[1])
    assert path.read_bytes() == whole  # the same weights are the same file
    for content in (whole[: len(whole) // 2], b"", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="u.pt: cannot be read as a checkpoint"):
            checkpoint.load(path, "unet")
    for at in (200, len(whole) // 3, len(whole) // 2):  # bytes overwritten: the checksums of the archive notice
        path.write_bytes(whole[:at] + bytes(b ^ 255 for b in whole[at : at + 20]) + whole[at + 20 :])
        with pytest.raises(ValueError, match="u.pt: cannot be read as a checkpoint"):
            checkpoint.load(path, "unet")
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="not a minipref checkpoint"):
        checkpoint.load(path, "unet")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"kind": "unet", "config": {}, "state": {}, "meta": types.SimpleNamespace()}, tmp_path / "u.pt")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "u.pt", "unet")


def test_weights_of_another_configuration_are_refused():
    state, config = UNet(TINY).state_dict(), dataclasses.asdict(TINY)
    for change, message in (
        ({"block_out_channels": (8,)}, "of another shape or kind; first: conv_in.weight"),
        ({"layers_per_block": 2}, "tensors missing.*first: missing down_blocks.0.resnets.1"),
    ):
        with pytest.raises(ValueError, match=f"u.pt: weights of another configuration.*{message}"):
            checkpoint.build(UNetConfig, UNet, {**config, **change}, state, "u.pt")
    with pytest.raises(ValueError, match="1 unknown.*unknown extra"):
        checkpoint.build(UNetConfig, UNet, config, {**state, "extra": torch.zeros(1)}, "u.pt")
    with pytest.raises(ValueError, match="u.pt: its configuration does not fit UNetConfig"):
        checkpoint.build(UNetConfig, UNet, {**config, "colour": 1}, state, "u.pt")


WRONG = [
    {"sample_size": "16"}, {"sample_size": 16.0}, {"sample_size": True}, {"sample_size": [16]},
    {"block_out_channels": [4, "x"]}, {"block_out_channels": 4}, {"attention_head_dim": "1"},
    {"attention_head_dim": [1, None]}, {"use_linear_projection": 1}, {"norm_eps": None}, {"mid_block_type": ["x"]},
]  # fmt: skip


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_a_configuration_of_other_types_names_the_field(change):
    config = dataclasses.asdict(TINY) | {"block_out_channels": [4], "freq_shift": 0}  # as JSON has them
    checkpoint.build(UNetConfig, UNet, config, UNet(TINY).state_dict(), "u.pt")
    with pytest.raises(ValueError, match=rf"^u.pt: its configuration does not fit UNetConfig \({[*change][0]}: "):
        checkpoint.build(UNetConfig, UNet, config | change, UNet(TINY).state_dict(), "u.pt")


# ------------------------------------------------------------------------------------------------ run folders


VERSIONS = {"minipref": minipref.__version__, "torch": torch.__version__, "python": platform.python_version()}


def test_a_run_folder_logs_plain_json_and_is_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunFolder("", "runs/x", {"seed": 1, "device": "cpu"}, "train_rl.py")
    run.log(epoch=1, reward=float("nan"), kl=0.123456789)
    run.log(epoch=2, reward=2.0)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"epoch": 1, "reward": None, "kl": 0.1234568}, {"epoch": 2, "reward": 2.0}]
    whole = {"seed": 1, "device": "cpu", "script": "train_rl.py", "versions": VERSIONS}
    assert run.column("kl") == ([1], [0.123456789]) and read_config("runs/x") == whole
    assert json.loads((run.path / "config.json").read_text(encoding="utf-8")) == whole
    assert (run.path / "command.txt").read_text(encoding="utf-8").startswith("python ")
    assert RunFolder("", "runs/x", {}, "s").path == Path("runs/x-2")
    with pytest.raises(ValueError, match="holds something already"):
        RunFolder("runs/x", "", {}, "s")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "reward.pt").touch()
    with pytest.raises(ValueError, match="holds something already"):
        RunFolder("weights", "", {}, "s")
    (tmp_path / "empty").mkdir()
    assert RunFolder("empty", "", {}, "s").path == Path("empty")
    with pytest.raises(FileNotFoundError, match="no run lies there"):
        read_config("runs/none")
    (run.path / "config.json").write_text('{"seed":')
    with pytest.raises(ValueError, match="not readable as JSON"):
        read_config("runs/x")


# What config.json held before it named its script, as far as names have changed or look as if they had.
OLD_RUNS = {
    "train_rl.py": (
        {"clip_range": 1.64, "steps": 6, "updates": 2, "prompts": 16, "lr": 1e-4, "eta": 1.0, "reward": "model"},
        {"clip_range": 1.64, "sampling_steps": 6, "updates_per_epoch": 2, "prompts": 16, "lr": 1e-4, "eta": 1.0,
         "reward": "model"},
    ),
    "train_rpo.py": (
        {"lam_val": 0.5, "steps": 400, "sample_steps": 50, "prompts": "mine.txt", "batch": 4, "train_prompts": 8},
        {"lam_val": 0.5, "updates": 400, "sampling_steps": 50, "prompt_file": "mine.txt", "batch_size": 4,
         "train_prompts": 8},
    ),
    "train_reward.py": (
        {"psi_norm": 0.0, "steps": 6, "batch": 32, "resume_with": "r", "second_prompts": 300, "prompts": 1536},
        {"psi_norm": 0.0, "sampling_steps": 6, "batch_size": 32, "second_round": "r", "second_round_prompts": 300,
         "prompts": 1536},
    ),
    "": ({"steps": 3, "batch": 1}, {"steps": 3, "batch": 1}),  # no script of ours
}  # fmt: skip


@pytest.mark.parametrize("script", OLD_RUNS)
def test_the_configuration_of_an_old_run_is_read_under_todays_names(script, tmp_path):
    old, today = OLD_RUNS[script]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert read_config(tmp_path) == today | {"script": script}
    # Read as it is where the script stands in it: today's names that were other things' before stay.
    (tmp_path / "config.json").write_text(json.dumps(today | {"script": script, "updates": 9, "prompts": 8}))
    assert read_config(tmp_path) == today | {"script": script, "updates": 9, "prompts": 8}


def test_progress_on_a_pipe_is_whole_lines(capsys):
    assert list(progress(range(3), "work")) == [0, 1, 2]
    text = capsys.readouterr().err
    assert "work" in text and "3/3" in text and "\r" not in text and text.endswith("\n")


# ------------------------------------------------------------------------------------------------ your own pictures


def test_pictures_of_any_size_and_mode_become_squares(tmp_path):
    red = np.zeros((40, 60, 3), np.uint8)
    red[..., 0] = 255
    Image.fromarray(red).save(tmp_path / "rgb.png")
    Image.fromarray(red).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(red).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    x = pictures.read_image(tmp_path / "rgb.png", 32)
    assert x.shape == (3, 32, 32) and x.dtype == torch.float32 and x[0].min() == 1 and x[1:].max() == 0
    assert torch.allclose(pictures.read_image(tmp_path / "palette.png", 32), x, atol=0.02)
    assert torch.allclose(pictures.read_image(tmp_path / "cmyk.jpg", 32), x, atol=0.05)
    assert pictures.read_image(tmp_path / "rgb.png", None).shape == (3, 40, 60)
    Image.fromarray(np.full((9, 9), 100, np.uint8)).save(tmp_path / "grey.png")
    assert torch.allclose(pictures.read_image(tmp_path / "grey.png", 32), torch.full((3, 32, 32), 100 / 255), atol=1e-6)
    Image.fromarray(np.full((9, 9), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert torch.allclose(pictures.read_image(tmp_path / "deep.png", 32), torch.full((3, 32, 32), 0.5), atol=0.01)
    clear = np.zeros((9, 9, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert pictures.read_image(tmp_path / "clear.png", 32).min() == 1  # transparency on white


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    wide = np.zeros((10, 20, 3), np.uint8)
    wide[:, :10] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    Image.fromarray(wide).save(tmp_path / "turned.png", exif=exif)
    x = pictures.read_image(tmp_path / "turned.png", None)
    assert x.shape == (3, 20, 10) and x[:, 0].min() == 1 and x[:, -1].max() == 0


def test_every_fifth_picture_is_held_out():
    x = torch.arange(12.0)
    train, held = pictures.split_pictures(x)
    assert held.tolist() == [4, 9] and sorted(train.tolist() + held.tolist()) == x.tolist()
    assert all(torch.equal(part, x[:9]) for part in pictures.split_pictures(x[:9]))


def test_bad_files_are_named_and_skipped_and_an_empty_folder_stops(tmp_path):
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(tmp_path / "deep" / "good.PNG")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:600])
    (tmp_path / "fake.png").write_text("no picture")
    (tmp_path / "note.txt").write_text("ignored")
    (tmp_path / "phone.HEIC").write_text("a format that is not read")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    images, files, skipped = pictures.read_folder(tmp_path, 32)
    assert images.shape == (1, 3, 32, 32) and [f.name for f in files] == ["good.PNG"]
    assert len(skipped) == 4 and "cut.jpg: not a readable picture" in skipped[0] and "fake.png" in skipped[1]
    assert "gone.jpg: no such picture" in skipped[2] and "phone.HEIC: is not read; convert it" in skipped[3]
    (tmp_path / "deep" / "good.PNG").unlink()
    with pytest.raises(ValueError, match="holds no readable picture.*skipped 4, the first: .*cut.jpg"):
        pictures.read_folder(tmp_path, 32)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        pictures.read_folder(tmp_path / "none", 32)
    with pytest.raises(FileNotFoundError, match="no such picture"):
        pictures.read_image(tmp_path / "none.png", 32)


def test_a_mask_is_white_in_the_hole_and_as_large_as_its_picture(tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 30:] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    m = pictures.read_mask(tmp_path / "m.png", (40, 60), 32)  # centre square: columns 10 to 50
    assert m.shape == (1, 32, 32) and m[0, :, 16:].min() == 1 and m[0, :, :16].max() == 0
    with pytest.raises(ValueError, match="60×40 pixels but the picture 50×50"):
        pictures.read_mask(tmp_path / "m.png", (50, 50), 32)
    clear = np.zeros((40, 60, 4), np.uint8)
    clear[:, 30:] = 255
    Image.fromarray(clear).save(tmp_path / "clear.png")  # white on transparency, or a hole cut out of it?
    with pytest.raises(ValueError, match="clear.png: the mask has transparent parts"):
        pictures.read_mask(tmp_path / "clear.png", (40, 60), 32)
    thin = np.zeros((512, 512), np.uint8)
    thin[:, 300:303] = 255
    Image.fromarray(thin).save(tmp_path / "thin.png")
    assert pictures.read_mask(tmp_path / "thin.png", (512, 512), 32)[0].sum() == 32  # three of 512 columns: one of 32
    aside = np.zeros((40, 100), np.uint8)
    aside[:, :20] = 255
    Image.fromarray(aside).save(tmp_path / "aside.png")
    with pytest.raises(ValueError, match="outside the centre square of 40 pixels"):
        pictures.read_mask(tmp_path / "aside.png", (40, 100), 32)
    Image.fromarray(mask * 0).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match="no white pixel"):
        pictures.read_mask(tmp_path / "m.png", (40, 60), 32)


@pytest.mark.parametrize("name,old,new", mutate.KERNEL_FAULTS)
def test_the_faults_that_mutate_injects_have_their_place(name, old, new):
    """Not among the kernels' own tests: there it would fail for every fault, and hide whether they notice it."""
    text = (ROOT / "minipref" / "kernels" / f"{name}.py").read_text(encoding="utf-8")
    assert text.count(old) == 1 and old != new


@pytest.mark.parametrize("number", range(len(mutate.ORCHESTRATION_FAULTS)))
def test_the_faults_of_orchestration_have_their_place_and_are_python(number):
    name, old, new = mutate.ORCHESTRATION_FAULTS[number]
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.count(old) == 1 and old != new
    ast.parse(text.replace(old, new))
    assert all((ROOT / "tests" / f"test_{t}.py").is_file() for t in mutate.SEEN_BY[name])


def test_mutate_knows_every_file_that_is_a_paper_and_its_tests():
    papers = ["diffusion", "reward_model", "rewards", "losses", "metrics"]
    specifications = ["kernels/ddim_step_logprob", "kernels/preference_loss"]
    assert mutate.FILES == [f"{name}.py" for name in papers + specifications]
    for name, tests in mutate.TESTS.items():
        assert (ROOT / "minipref" / name).is_file() and all((ROOT / "tests" / t).is_file() for t in tests)
    for name, definitions in mutate.SPECIFICATIONS.items():
        text = (ROOT / "minipref" / name).read_text(encoding="utf-8")
        assert name in mutate.FILES and all(f"def {d}(" in text for d in definitions)
