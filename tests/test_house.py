"""The house keeps its order: imports, configuration, checkpoints, run folders, pictures that people bring."""

import ast
import dataclasses
import importlib
import json
import re
import sys
import types
from pathlib import Path

import mutate
import numpy as np
import pytest
import torch
from PIL import Image

from minipref.data import folders
from minipref.models.unet import UNet, UNetConfig
from minipref.runtime import checkpoint
from minipref.runtime.config import opt, parse, run_main
from minipref.runtime.runlog import RunFolder, progress, read_run

ROOT = Path(__file__).parent.parent
CORE = {"torch", "numpy", "PIL", "tqdm"}
LEVELS = [{"runtime", "kernels"}, {"models", "data"}, {"diffusion", "rewards", "losses", "metrics"}]  # the rest above


def imports(path: Path):
    """(top-level package, room of minipref or None) of every import in a file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((a.name.split(".")[0], None) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = path.relative_to(ROOT).parent.parts  # ("minipref", room, …)
            full = list(inside[: len(inside) - node.level + 1]) if node.level else []
            full += node.module.split(".") if node.module else []
            if full[0] == "minipref" and len(full) == 1:
                yield from (("minipref", a.name) for a in node.names)
            else:
                yield full[0], full[1] if full[0] == "minipref" else None


def level(room: str) -> int:
    return next((i for i, names in enumerate(LEVELS) if room in names), len(LEVELS))


def test_imports_go_one_way():
    checked = 0
    for path in (ROOT / "minipref").rglob("*.py"):
        own = path.relative_to(ROOT / "minipref").parts[0].removesuffix(".py")
        for package, room in imports(path):
            if package == "minipref" and room != own:
                checked += 1
                same_floor = level(own) == level(room) and level(own) >= 2
                assert level(room) < level(own) or same_floor, f"{path.name} imports {room}"
    assert checked > 30


def test_only_the_core_dependencies_are_imported():
    files = [*(ROOT / "minipref").rglob("*.py"), *ROOT.glob("train_*.py")]
    found = {(p, f.name) for f in files for p, _ in imports(f)}
    # Optional: asked for in one place each, which says what happens without it.
    found -= {("triton", "common.py"), ("diffusers", "bench.py")}
    outside = {p for p, _ in found} - set(sys.stdlib_module_names) - {"minipref"}
    assert outside <= CORE, outside - CORE


CONFIGS = {
    "train_rl": "RLConfig",
    "train_rpo": "RPOConfig",
    "minipref.bench": "BenchConfig",
    "train_reward": "RewardConfig",
    "minipref.pretrain": "PretrainConfig",
    "minipref.check_data": "CheckConfig",
    "minipref.sample": "SampleConfig",
    "minipref.evaluate": "EvaluateConfig",
}


@pytest.mark.parametrize("module", CONFIGS)
def test_every_config_field_is_read_and_explained(module):
    found = importlib.import_module(module)
    config = getattr(found, CONFIGS[module])
    homes = {sys.modules[c.__module__].__file__ for c in config.__mro__[:-1]}  # a configuration may build on another
    source = "".join(Path(f).read_text(encoding="utf-8") for f in homes)
    used = set(re.findall(r"\bcfg\.(\w+)", source))
    for f in dataclasses.fields(config):
        assert f.name in used, f"{module}: --{f.name} is read nowhere"
        assert len(f.metadata["help"]) > 10
    assert config.__dataclass_params__.frozen


# ------------------------------------------------------------------------------------------------ command lines


@dataclasses.dataclass(frozen=True)
class Example:
    lr: float = opt(0.1, "learning rate", lo=0, hi=1)
    steps: int = opt(5, "number of steps", lo=1)
    kind: str = opt("a", "which kind", choices=("a", "b"))
    quick: bool = opt(False, "whether to hurry")


PRESETS = {"small": {"steps": 7}, "large": {"steps": 70, "lr": 0.5}}


def parsed(*argv):
    return parse(Example, list(argv), prog="example.py", description="", presets=PRESETS)


def test_flags_override_presets_and_presets_override_defaults():
    assert parsed() == Example() and parsed("--small") == Example(steps=7) == parsed("--preset", "small")
    assert parsed("--large", "--lr", "0.2", "--quick") == Example(lr=0.2, steps=70, quick=True)
    assert parsed("--no-quick", "--kind", "b") == Example(kind="b")


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--lrr", "1"], "unrecognized arguments: --lrr"),
        (["--ste", "1"], "unrecognized arguments: --ste"),
        (["--lr", "2"], "--lr 2.0: out of range, allowed are 0 to 1"),
        (["--lr", "nan"], "--lr nan: not a finite number"),
        (["--steps", "0"], "--steps 0: out of range"),
        (["--steps", "x"], "argument --steps: invalid int value"),
        (["--kind", "c"], "--kind c: choose from a, b"),
        (["--kind", ""], "--kind: an empty value; leave the flag out"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_a_wrong_flag_is_one_clear_line_and_exit_code_two(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and message in text and text.count("\n") == 1 and text.startswith("example.py: ")


def test_errors_that_a_user_can_mend_are_one_line(capsys):
    def broken():
        raise ValueError("a line\n  and another")

    with pytest.raises(SystemExit) as stop:
        run_main("example.py", broken)
    assert stop.value.code == 2 and capsys.readouterr().err == "example.py: a line and another\n"

    with pytest.raises(SystemExit) as stop:
        run_main("example.py", lambda: torch.empty(1 << 60))  # more than any machine has
    assert stop.value.code == 2 and "example.py: out of memory; ask for fewer pictures" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="shape"):  # a fault of ours keeps its traceback
        run_main("example.py", lambda: torch.zeros(2).view(3))


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
        ({"block_out_channels": (8,)}, "of another shape; first: conv_in.weight"),
        ({"layers_per_block": 2}, "tensors missing.*first: missing down_blocks.0.resnets.1"),
    ):
        with pytest.raises(ValueError, match=f"u.pt: weights of another configuration.*{message}"):
            checkpoint.build(UNetConfig, UNet, {**config, **change}, state, "u.pt")
    with pytest.raises(ValueError, match="1 unknown.*unknown extra"):
        checkpoint.build(UNetConfig, UNet, config, {**state, "extra": torch.zeros(1)}, "u.pt")
    with pytest.raises(ValueError, match="u.pt: its configuration does not fit UNetConfig"):
        checkpoint.build(UNetConfig, UNet, {**config, "colour": 1}, state, "u.pt")


# ------------------------------------------------------------------------------------------------ run folders


def test_a_run_folder_logs_plain_json_and_is_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunFolder("", "runs/x", {"seed": 1})
    run.log(epoch=1, reward=float("nan"), kl=0.123456789)
    run.log(epoch=2, reward=2.0)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"epoch": 1, "reward": None, "kl": 0.1234568}, {"epoch": 2, "reward": 2.0}]
    assert run.column("kl") == ([1], [0.123456789]) and read_run("runs/x") == {"seed": 1}
    assert (run.path / "command.txt").read_text(encoding="utf-8").startswith("python ")
    assert RunFolder("", "runs/x", {}).path == Path("runs/x-2")
    with pytest.raises(ValueError, match="holds something already"):
        RunFolder("runs/x", "", {})
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "reward.pt").touch()
    with pytest.raises(ValueError, match="holds something already"):
        RunFolder("weights", "", {})
    (tmp_path / "empty").mkdir()
    assert RunFolder("empty", "", {}).path == Path("empty")
    with pytest.raises(FileNotFoundError, match="no run lies there"):
        read_run("runs/none")
    (run.path / "config.json").write_text('{"seed":')
    with pytest.raises(ValueError, match="not readable as JSON"):
        read_run("runs/x")


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
    x = folders.read_image(tmp_path / "rgb.png", 32)
    assert x.shape == (3, 32, 32) and x.dtype == torch.float32 and x[0].min() == 1 and x[1:].max() == 0
    assert torch.allclose(folders.read_image(tmp_path / "palette.png", 32), x, atol=0.02)
    assert torch.allclose(folders.read_image(tmp_path / "cmyk.jpg", 32), x, atol=0.05)
    assert folders.read_image(tmp_path / "rgb.png", None).shape == (3, 40, 60)
    Image.fromarray(np.full((9, 9), 100, np.uint8)).save(tmp_path / "grey.png")
    assert torch.allclose(folders.read_image(tmp_path / "grey.png", 32), torch.full((3, 32, 32), 100 / 255), atol=1e-6)
    Image.fromarray(np.full((9, 9), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert torch.allclose(folders.read_image(tmp_path / "deep.png", 32), torch.full((3, 32, 32), 0.5), atol=0.01)
    clear = np.zeros((9, 9, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert folders.read_image(tmp_path / "clear.png", 32).min() == 1  # transparency on white


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    wide = np.zeros((10, 20, 3), np.uint8)
    wide[:, :10] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    Image.fromarray(wide).save(tmp_path / "turned.png", exif=exif)
    x = folders.read_image(tmp_path / "turned.png", None)
    assert x.shape == (3, 20, 10) and x[:, 0].min() == 1 and x[:, -1].max() == 0


def test_every_fifth_picture_is_held_out():
    x = torch.arange(12.0)
    train, held = folders.split_pictures(x)
    assert held.tolist() == [4, 9] and sorted(train.tolist() + held.tolist()) == x.tolist()
    assert all(torch.equal(part, x[:9]) for part in folders.split_pictures(x[:9]))


def test_bad_files_are_named_and_skipped_and_an_empty_folder_stops(tmp_path):
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(tmp_path / "deep" / "good.PNG")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:600])
    (tmp_path / "fake.png").write_text("no picture")
    (tmp_path / "note.txt").write_text("ignored")
    (tmp_path / "phone.HEIC").write_text("a format that is not read")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    images, files, skipped = folders.read_folder(tmp_path, 32)
    assert images.shape == (1, 3, 32, 32) and [f.name for f in files] == ["good.PNG"]
    assert len(skipped) == 4 and "cut.jpg: not a readable picture" in skipped[0] and "fake.png" in skipped[1]
    assert "gone.jpg: no such picture" in skipped[2] and "phone.HEIC: is not read; convert it" in skipped[3]
    (tmp_path / "deep" / "good.PNG").unlink()
    with pytest.raises(ValueError, match="holds no readable picture.*skipped 4, the first: .*cut.jpg"):
        folders.read_folder(tmp_path, 32)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        folders.read_folder(tmp_path / "none", 32)
    with pytest.raises(FileNotFoundError, match="no such picture"):
        folders.read_image(tmp_path / "none.png", 32)


def test_a_mask_is_white_in_the_hole_and_as_large_as_its_picture(tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 30:] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    m = folders.read_mask(tmp_path / "m.png", (40, 60), 32)  # centre square: columns 10 to 50
    assert m.shape == (1, 32, 32) and m[0, :, 16:].min() == 1 and m[0, :, :16].max() == 0
    with pytest.raises(ValueError, match="60×40 pixels but the picture 50×50"):
        folders.read_mask(tmp_path / "m.png", (50, 50), 32)
    clear = np.zeros((40, 60, 4), np.uint8)
    clear[:, 30:] = 255
    Image.fromarray(clear).save(tmp_path / "clear.png")  # white on transparency
    assert torch.equal(folders.read_mask(tmp_path / "clear.png", (40, 60), 32), m)
    thin = np.zeros((512, 512), np.uint8)
    thin[:, 300:303] = 255
    Image.fromarray(thin).save(tmp_path / "thin.png")
    assert folders.read_mask(tmp_path / "thin.png", (512, 512), 32)[0].sum() == 32  # three of 512 columns: one of 32
    aside = np.zeros((40, 100), np.uint8)
    aside[:, :20] = 255
    Image.fromarray(aside).save(tmp_path / "aside.png")
    with pytest.raises(ValueError, match="outside the centre square of 40 pixels"):
        folders.read_mask(tmp_path / "aside.png", (40, 100), 32)
    Image.fromarray(mask * 0).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match="no white pixel"):
        folders.read_mask(tmp_path / "m.png", (40, 60), 32)


@pytest.mark.parametrize("name,old,new", mutate.KERNEL_FAULTS)
def test_the_faults_that_mutate_injects_have_their_place(name, old, new):
    """Not among the kernels' own tests: there it would fail for every fault, and hide whether they notice it."""
    text = (ROOT / "minipref" / "kernels" / f"{name}.py").read_text(encoding="utf-8")
    assert text.count(old) == 1 and old != new
