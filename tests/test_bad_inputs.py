"""Bad inputs to every command and script: each ends in one line that names the flag or file, and changes nothing.

A row of the table is a command, its arguments, and what the line must name. Paths are relative to one folder of good
and bad files, which is compared with its listing of before.
"""

import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minipref.pipeline import SHIPPED, Pipeline
from minipref.runtime import checkpoint
from minipref.runtime.config import run_main

ROOT = Path(__file__).parent.parent
START = {  # what every row of a command begins with; later flags win
    "train_rl.py": "--small --sampling-steps 2 --eval-prompts 8 --win-prompts 8 --threads 1",
    "train_rpo.py": "--small --sampling-steps 2 --threads 1",
    "train_reward.py": "--small --sampling-steps 2 --threads 1",
    "pretrain": "--small --threads 1",
}
MODULES = {"tutorials/run.py": "run", "tutorials/claims.py": "claims", "minipref": "minipref.__main__"}

TABLE: dict[str, list[tuple[str, str]]] = {
    "minipref": [
        ("trane", "unknown command 'trane'"), ("--verbose", "unknown command '--verbose'"),
        ("tutorial 3", "tutorials/run.py"), ("claims", "tutorials/claims.py"),
    ],
    "train_rl.py": [
        ("--epochs 0", "--epochs"), ("--epochs 1e3", "--epochs"), ("--epochs 10000000000", "--epochs"),
        ("--prompts -1", "--prompts"), ("--samples 0", "--samples"), ("--sampling-steps 1", "--sampling-steps"),
        ("--sampling-steps 1001", "--sampling-steps"), ("--eta 0", "--eta"), ("--eta 2", "--eta"), ("--lr nan", "--lr"),
        ("--lr inf", "--lr"), ("--lr -1", "--lr"), ("--lr 1e308", "--lr"), ("--lr", "--lr"),
        ("--clip-range 0", "--clip-range"), ("--trust maybe", "--trust"), ("--kl-weight -0.1", "--kl-weight"),
        ("--guard 1.5", "--guard"), ("--ema 1", "--ema"), ("--micro-batch 0", "--micro-batch"),
        ("--reward-batch 0", "--reward-batch"), ("--reward-batch 1000000", "--reward-batch"),
        ("--eval-prompts 7", "--eval-prompts"), ("--eval-prompts 1000000001", "--eval-prompts"),
        (f"--win-prompts {10**30}", "--win-prompts"), ("--held-out 1000000", "--held-out"), ("--seed -1", "--seed"),
        ("--device gpu", "--device"), ("--device cuda:99", "--device"), ("--threads 1025", "--threads"),
        ("--bogus", "--bogus"), ("--steps 3", "--sampling-steps"), ("--updates 3", "--updates-per-epoch"), ("x", "x"),
        ("--preset large", "--preset"), ("--prompts 1 --samples 1", "--prompts"), ("--data ''", "--data"),
        ("--updates-per-epoch 1000", "--updates-per-epoch"), ("--weights nowhere", "nowhere"),
        ("--weights empty", "empty/unet.pt"), ("--weights garbage", "garbage/unet.pt"),
        ("--weights cut", "cut/unet.pt"), ("--weights swapped", "swapped/unet.pt"),
        ("--weights wordless", "wordless/clip.pt"),
        ("--weights self", "self"), ("--weights run_deep", "run_deep/config.json"),
        ("--data nowhere", "nowhere"), ("--data empty", "empty"), ("--data text.txt", "text.txt"),
        ("--data loop", "loop"), ("--data strange", "strange"), ("--out pictures", "--out"),
        ("--out text.txt", "--out"), ("--out text.txt/x", "--out"), ("--out loop", "--out"), ("--out /proc/x", "--out"),
        ("--reward nonsense", "--reward nonsense"), ("--reward model+nonsense", "--reward term 'nonsense'"),
        ("--reward x*model", "--reward term 'x*model'"), ("--reward nan*model", "--reward term 'nan*model'"),
        ("--reward model:nowhere", "nowhere"), ("--reward model:text.txt", "text.txt"),
        ("--reward model:empty", "empty"), ("--reward 'clip:a dog'", "dog"), ("--reward clip:", "--reward"),
        ("--reward math:pi", "--reward math:pi"),
        ("--reward no_such_module:f", "--reward no_such_module:f"), ("--reward :f", "--reward :f"),
        ("--reward leaving_module:f", "--reward leaving_module:f"), ("--reward bad_rewards:boom", "bad_rewards:boom"),
        ("--reward bad_rewards:leave", "bad_rewards:leave"), ("--reward bad_rewards:nan", "bad_rewards:nan"),
        ("--reward bad_rewards:flat", "bad_rewards:flat"), ("--reward bad_rewards:words", "bad_rewards:words"),
        ("--reward bad_rewards:matrix", "bad_rewards:matrix"), ("--reward bad_rewards:waves", "bad_rewards:waves"),
        ("--reward bad_rewards:greedy --reward-batch 100", "bad_rewards:greedy"),
        ("--reward gold --data pictures", "gold"),
    ],
    "train_rpo.py": [
        ("--subject -1", "--subject"), ("--subject 1000", "--subject"), ("--lam-val 2", "--lam-val"),
        ("--label-temperature 0", "--label-temperature"), ("--grad-clip 0", "--grad-clip"), ("--mode dpo", "--mode"),
        ("--beta 1e12", "--beta"), ("--mode preference --beta 0", "--beta"), ("--mode similarity --beta 3", "--beta"),
        ("--class-name dog", "--class-name"), ("--live", "--live"), ("--prompt-file texts", "--prompt-file"),
        ("--references pictures --subject 3", "--subject"), ("--references pictures", "--class-name"),
        ("--references nowhere --class-name dog", "nowhere"), ("--references empty --class-name dog", "empty"),
        ("--references one --class-name dog", "one"), ("--references nested --class-name dog", "nested"),
        ("--references pictures --class-name '[V]'", "--class-name"),
        ("--references listed/bad --class-name dog", "prompts_and_classes.txt"),
        ("--references pictures --class-name dog --prompt-file nowhere", "nowhere"),
        ("--references pictures --class-name dog --prompt-file fifo", "fifo"),
        ("--references pictures --class-name dog --prompt-file utf16", "utf16"),
        ("--references pictures --class-name dog --prompt-file text.txt", "text.txt"),
        ("--references pictures --class-name dog --prompt-file long --train-prompts 1 --val-prompts 1",
         "'a [V] dog very"),
        ("--references pictures --class-name dog --train-prompts 100", "--train-prompts"),
        ("--image-encoder nothing:f", "--image-encoder"), ("--image-encoder bad_rewards:boom", "bad_rewards:boom"),
        ("--image-encoder bad_rewards:leave", "bad_rewards:leave"), ("--weights nowhere", "nowhere"),
        ("--image-encoder bad_rewards:nan", "bad_rewards:nan"), ("--out text.txt", "--out"), ("--out run", "--out"),
        ("--batch 3", "--batch-size"), ("--steps 3", "--updates"), ("--weights rpo_wrong", "rpo_wrong/config.json"),
    ],
    "train_reward.py": [
        ("--ratings nowhere", "nowhere"), ("--ratings empty", "empty"), ("--ratings utf16", "utf16"),
        ("--ratings rated", "rated"), ("--ratings escaping", "escaping"), ("--ratings rated,nowhere", "nowhere"),
        ("--ratings rated --score-lo 7 --score-hi 1", "scores from 7 to 1"), ("--score-lo -1e10", "--score-lo"),
        ("--trust-lo 3 --trust-hi 1", "--trust-lo"), ("--delta 0", "--delta"), ("--delta 1", "--delta"),
        ("--lam 0", "--lam"), ("--policies run,nowhere", "nowhere"), ("--second-round nowhere", "nowhere"),
        ("--second-round rpo_wrong", "rpo_wrong/config.json"), ("--bins 1", "--bins"), ("--features vit", "--features"),
        ("--objective ranks", "--objective"), ("--batch-size 1", "--batch-size"), ("--dim 0", "--dim"),
        ("--prompts 19", "--prompts"), ("--resume-with x", "--second-round"), ("--weights empty", "empty/unet.pt"),
        ("--out text.txt", "--out"),
    ],
    "evaluate": [
        ("--run nowhere", "nowhere"), ("--run text.txt", "text.txt"), ("--run run_cut", "run_cut/config.json"),
        ("--run run_deep", "run_deep/config.json"), ("--run run_list", "run_list/config.json"),
        ("--run run_wrong", "run_wrong/config.json"), ("--run run_foreign", "--reward"),
        ("--run run_missing", "run_missing/last.pt"), ("--run run_moved", "--weights"),
        ("--run rpo", "rpo/config.json"),
        ("--run run --checkpoint best", "run/best.pt"), ("--run run --weights other", "run/last.pt"),
        ("--run run --guidance 3", "--guidance"), ("--run run --reward jpeg_size", "--reward jpeg_size"),
        ("--run run --data nowhere", "nowhere"), ("--reward brightness", "--reward"), ("--data pictures", "--data"),
        ("--prompts 7", "--prompts"), ("--best-of 0", "--best-of"), ("--checkpoint middle", "--checkpoint"),
        ("--guidance -1", "--guidance"), ("--guidance 1e308", "--guidance"), ("--steps 3", "--sampling-steps"),
        ("--weights nowhere", "nowhere"), ("--reward-batch 0", "--reward-batch"), ("--device tpu", "--device"),
        ("--run run_types", "run_types/config.json"),
    ],
    "sample": [
        ("--image nowhere.png", "nowhere.png"), ("--image fifo", "fifo"), ("--image strange/words.png", "words.png"),
        ("--image strange/e.png", "e.png"), ("--image strange/tiff.png", "tiff.png"), ("--image pictures", "pictures"),
        ("--image loop", "loop"), ("--image strange/half.jpg", "half.jpg"), ("--mask black.png", "--mask"),
        ("--image pictures/0.png --mask small.png", "small.png"), ("--full --mask small.png", "--mask"),
        ("--image pictures/0.png --mask black.png", "black.png"), ("--out text.txt", "--out"), ("--out x.gif", "--out"),
        ("--image pictures/0.png --mask clear.png", "clear.png"), ("--out black.png", "--out black.png"),
        ("--out pictures", "--out"), ("--out text.txt/x.png", "--out"), ("--out pictures.png", "--out"),
        ("--out dangling.png", "--out"), ("--count 0", "--count"), ("--count 10001", "--count"),
        ("--eta -0.5", "--eta"), ("--guidance -0.5", "--guidance"),
        (f"--full --prompt '{'red ' * 40}'", "--prompt"), ("--run rpo", "--prompt"),
        ("--run rpo --prompt 'a dog'", "--prompt"), ("--run rpo --image black.png --prompt '[V]'", "--prompt"),
        ("--run nowhere", "nowhere"), ("--run run --checkpoint best", "run/best.pt"), ("--seed -1", "--seed"),
        ("--weights nowhere", "nowhere"), ("--sampling-steps 1001", "--sampling-steps"), ("--run run_list", "run_list"),
    ],
    "check-data": [
        ("", "check-data"), ("nowhere", "nowhere"), ("text.txt", "text.txt"), ("empty", "empty"),
        ("strange", "strange"), ("utf16.jsonl", "utf16.jsonl"), ("deep.json", "deep.json"),
        ("nowhere.json", "nowhere.json"),
        ("fifo", "fifo"), ("loop", "loop"), ("rated --score-lo 7 --score-hi 1", "scores from 7 to 1"),
        ("rated --score-lo nan", "--score-lo"),
        ("escaping", "escaping"), ("pictures black.png", "black.png"), ("--folder pictures", "--folder"),
    ],
    "pretrain": [
        ("--only vae", "--only"), ("--clip-steps 0", "--clip-steps"), ("--unet-batch 0", "--unet-batch"),
        ("--ema 2", "--ema"), ("--unet-lr 1e300", "--unet-lr"), ("--start-from other", "--start-from"),
        ("--only clip --out other --start-from other", "--start-from"), ("--out other", "--out other"),
        ("--only unet --out unfinished", "unet-unfinished.pt"), ("--out text.txt", "--out"),
        ("--device tpu", "--device"), ("--only unet --out new", "new/clip.pt"),
        ("--only clip --out new --start-from empty", "empty/clip.pt"),
    ],
    "bench": [
        ("--part all_of_it", "--part"), ("--batch-size 0", "--batch-size"), ("--rounds 0", "--rounds"),
        ("--size large", "--size"), ("--batch 3", "--batch-size"), ("--sampling-steps 1", "--sampling-steps"),
        ("--train-steps 0", "--train-steps"), ("--out text.txt", "--out"), ("--out text.txt/x.md", "--out"),
        ("--out loop", "--out"), ("--device tpu", "--device"),
    ],
    "tutorials/run.py": [("9", "--number"), ("1 --exercise 99", "exercise 99"), ("1 --exercise -1", "--exercise")],
    "tutorials/claims.py": [
        ("--only nothing --out c", "--only"), ("--study ppo", "--study"), ("--study rl --subjects 3", "--subjects"),
        ("--study rl --seeds 1", "--seeds"), ("--flags '\"'", "--flags"), ("--flags '--seed 3'", "--flags"),
        ("--out text.txt", "--out"),
    ],
}  # fmt: skip
ROWS = [(command, *row) for command, rows in TABLE.items() for row in rows]

REWARDS = """
import sys
import torch

def boom(images, *prompts): raise RuntimeError("no\\nreward")
def leave(images, *prompts): sys.exit(0)
def nan(images, *prompts): return images.mean((1, 2, 3)) / 0 - images.mean((1, 2, 3)) / 0
def flat(images, *prompts): return torch.ones(len(images))
def words(images, *prompts): return ["good"] * len(images)
def matrix(images, *prompts): return images.mean((2, 3))
def waves(images, *prompts): return torch.fft.fft(images.mean((1, 2, 3)))
def greedy(images, *prompts):
    if len(images) > 64: raise MemoryError
    return images.mean((1, 2, 3))
"""


def runs(folder, base):
    """A finished run, and what can be wrong with one: each a copy whose config.json differs."""
    config = {"script": "train_rl.py", "weights": "", "data": "", "reward": "brightness", "seed": 0, "held_out": 0}
    config |= {"eval_prompts": 8, "sampling_steps": 2, "eta": 1.0}
    subject = {"script": "train_rpo.py", "weights": "", "references": "", "lam_val": 0.5, "sampling_steps": 2}
    subject |= {"guidance": 3.0, "eta": 1.0}
    contents = {
        "run": config, "run_foreign": config | {"reward": "bad_rewards:boom"},
        "run_moved": config | {"weights": "gone"}, "run_wrong": config | {"seed": "0"},
        "run_types": config | {"sampling_steps": None}, "run_missing": config,
        "run_list": [config], "self": config | {"weights": "self"}, "rpo": subject,
        "rpo_wrong": subject | {"guidance": [3]}, "run_cut": None, "run_deep": None,
    }  # fmt: skip
    meta = {"schedule": asdict(base.schedule.config), "base": base.fingerprint}
    for name, content in contents.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(content))
        file = folder / name / ("best.pt" if name == "rpo" else "last.pt")
        if name == "run":
            checkpoint.save(file, "unet", base.unet.config, base.unet.state_dict(), dtype=torch.float16, meta=meta)
        elif name != "run_missing":
            file.symlink_to(folder / "run" / "last.pt")
    (folder / "run_cut" / "config.json").write_text(json.dumps(config)[:50])
    (folder / "run_deep" / "config.json").write_text('{"a": ' * 100_000)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One folder of good and bad files; what is large is linked."""
    folder = tmp_path_factory.mktemp("place")
    names = (
        "empty pictures one nested/a strange listed/bad rated escaping garbage cut swapped wordless other unfinished"
    )
    for name in names.split():
        (folder / name).mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    for i, where in enumerate(("pictures/0", "pictures/1", "one/0", "nested/a/0")):
        Image.fromarray(noise[i]).save(folder / f"{where}.png")
    for name in "01":
        shutil.copy(folder / "pictures" / "0.png", folder / "listed" / "bad" / f"{name}.png")
    (folder / "listed" / "prompts_and_classes.txt").write_text("Object Prompts\n'a {0.__class__} {1}'.format(a, b)\n")
    Image.new("L", (16, 32), 255).save(folder / "small.png")
    Image.new("L", (32, 32), 0).save(folder / "black.png")
    Image.new("LA", (32, 32), (255, 0)).save(folder / "clear.png")
    (folder / "strange" / "words.png").write_text("no picture")
    (folder / "strange" / "e.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EOF\n")
    Image.fromarray(noise[0]).save(folder / "strange" / "tiff.png", "TIFF")
    (folder / "strange" / "half.jpg").write_bytes((folder / "pictures" / "0.png").read_bytes()[:200])
    (folder / "text.txt").write_text("a line\n")
    (folder / "long").write_text("".join(f"a [V] dog {'very ' * (30 * (i == 1))} number{i}\n" for i in range(5)))
    for name in ("utf16", "utf16.jsonl"):
        (folder / name).write_bytes("a [V] dog".encode("utf-16"))
    (folder / "deep.json").write_text("[" * 100_000)
    scores = {"structure": 5, "texture": 6, "overall": 5}
    row = {"image": "../pictures/0.png", "masked": "/etc/hostname", "prompt_id": "a", "scores": scores}
    (folder / "escaping" / "ratings.jsonl").write_text(json.dumps(row))
    (folder / "rated" / "ratings.jsonl").write_text(json.dumps(row | {"image": "0.png", "masked": "0.png"}))
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling.png").symlink_to("not_there")
    (folder / "bad_rewards.py").write_text(REWARDS)
    (folder / "leaving_module.py").write_text("raise SystemExit(0)\n")
    (folder / "garbage" / "unet.pt").write_bytes(b"garbage")
    (folder / "cut" / "unet.pt").write_bytes((SHIPPED / "unet.pt").read_bytes()[:5000])
    (folder / "swapped" / "unet.pt").symlink_to(SHIPPED / "clip.pt")
    (folder / "unfinished" / "unet-unfinished.pt").symlink_to(SHIPPED / "unet.pt")
    for name in ("wordless", "other"):
        (folder / name / "unet.pt").symlink_to(SHIPPED / "unet.pt")
    clip = torch.load(SHIPPED / "clip.pt", weights_only=True)
    clip["meta"]["words"] = clip["meta"]["words"][:5]
    torch.save(clip, folder / "wordless" / "clip.pt")
    (folder / "other" / "clip.pt").symlink_to(SHIPPED / "clip.pt")
    unet = torch.load(SHIPPED / "unet.pt", weights_only=True)
    unet["state"]["conv_out.bias"] += 1
    (folder / "other" / "unet.pt").unlink()
    torch.save(unet, folder / "other" / "unet.pt")
    runs(folder, Pipeline.load(None))
    return folder


def listing(folder):
    """Every path below a folder with what it is: a link's goal, a file's hash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else ""
        if not kind and path.is_file():
            kind = hashlib.sha1(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = kind
    return found


def one_line(text, name):
    """`text` is one line under 300 characters that holds `name`; progress bars aside."""
    lines = [x for x in text.splitlines() if not re.match(r"[\w ]+: +\d+%\|", x)]
    assert len(lines) == 1 and len(lines[0]) < 300 and name in lines[0] and lines[0].isprintable(), text


@pytest.fixture(scope="module")
def before(place):
    return listing(place)


@pytest.fixture(scope="module")
def shipped():
    """Pipeline.load that reads the shipped weights once."""
    load, base = Pipeline.load, Pipeline.load(None)
    return staticmethod(
        lambda weights, device="cpu": base if (weights or "", device) == ("", "cpu") else load(weights, device)
    )


@pytest.mark.parametrize("command,arguments,name", ROWS, ids=[f"{r[0]} {r[1]}"[:80] for r in ROWS])
def test_a_bad_input_is_one_line_that_names_it_and_changes_nothing(
    command, arguments, name, place, before, shipped, monkeypatch, capsys
):
    module = MODULES.get(command) or command.removesuffix(".py")
    if "." not in command and "/" not in command and command != "minipref":
        module = f"minipref.commands.{command.replace('-', '_')}"
    argv = shlex.split(f"{START.get(command, '')} {arguments}")
    main = importlib.import_module(module).main
    monkeypatch.chdir(place)
    monkeypatch.setattr(Pipeline, "load", shipped)
    monkeypatch.setattr(sys, "argv", [command, *argv])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", [str(place), *sys.path])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(command, main if module in (command.removesuffix(".py"), "minipref.__main__") else lambda: main(argv))
    text = capsys.readouterr().err
    assert stop.value.code == 2, text
    one_line(text, name)
    assert listing(place) == before


REAL = [
    ("train_rl.py --small --reward nonsense", "--reward"),
    ("train_rpo.py --small --references nowhere", "nowhere"),
    ("-m minipref sample --image fifo --out x.png", "fifo"),
    ("-m minipref evaluate --run run_foreign", "--reward"),
    ("-m minipref check-data loop", "loop"),
]


@pytest.mark.slow
@pytest.mark.parametrize("command,name", REAL)
def test_the_same_holds_of_real_commands(command, name, place, before):
    first, *arguments = shlex.split(command)
    first = str(ROOT / first) if first.endswith(".py") else first
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, first, *arguments], cwd=place, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    one_line(done.stderr, name)
    assert listing(place) == before


def test_the_table_is_long_enough_to_mean_something():
    assert len(ROWS) >= 120 and len(set(ROWS)) == len(ROWS)
