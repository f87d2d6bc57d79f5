"""What the shipped weights are made from: training pairs of mixed quality; and the way from there to a reward model."""

import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from helpers import TINY, stops_with, train_tiny

import train_reward
import train_rl
from minipref.commands import pretrain
from minipref.pipeline import SHIPPED, Pipeline, Sampling
from minipref.toy import world
from minipref.toy.world import scene_prompts


def config(**changes):
    return pretrain.PretrainConfig(**changes)


@pytest.fixture
def drawn(monkeypatch):
    """The scenes of every call of `draw`, in order."""
    seen, draw = [], world.draw
    monkeypatch.setattr(world, "draw", lambda batch: seen.append(batch) or draw(batch))
    return seen


def test_training_pairs_are_clean_outside_the_hole_and_sloppy_inside_about_half_of_the_time(drawn):
    """1,500 pictures; six standard errors of a share of one half: ±0.078, false alarm 2e-9."""
    cfg, sloppy, partial = config(unet_batch=1500), 0, 0
    images, masks, texts = pretrain.unet_batch(np.random.default_rng(0), cfg)
    true = world.draw(drawn[0])
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


def test_pictures_of_text_alone_hold_two_things_and_patterns_more_often(drawn):
    """4,000 pictures; six standard errors of a share: false alarm 2e-9 each."""
    _, masks, _ = pretrain.unet_batch(np.random.default_rng(1), config(unet_batch=4000, full_share=0.5))
    full = masks.mean((1, 2, 3)) == 1
    for among, two, plain in ((full, 0.55, 0.3), (~full, 0.35, 0.45)):
        held = [s for s, own in zip(drawn[0], among.tolist()) if own]
        for share, seen in (
            (two, [len(s.things) == 2 for s in held]),
            (plain, [s.things[0].pattern == "plain" for s in held]),
        ):
            assert abs(np.mean(seen) - share) < 6 * 0.5 / len(held) ** 0.5


def test_captions_of_the_encoders_name_the_quality_half_of_the_time_and_truly():
    images, texts, _ = pretrain.clip_batch(np.random.default_rng(0), 1000, hard_share=0.0)
    twin = np.random.default_rng(0)
    twin.random()  # whether the batch is a hard one
    true = world.draw([world.random_scene(twin, world.COLOURS, 0.35, 0.2) for _ in range(1000)])
    said = 0
    for x, t, text in zip(images, true, texts):
        quality = "clean" if torch.equal(x, t) else "sloppy"
        words = text.split()
        said += quality in words
        assert ("sloppy" if quality == "clean" else "clean") not in words
    assert abs(said / 1000 - 0.5) < 6 * 0.5 / 1000**0.5  # false alarm 2e-9


def test_half_of_the_contrastive_batches_hold_three_colours_only(drawn):
    """400 batches of 8 scenes; 6 standard errors: false alarm 2e-9. Other batches hold more than three."""
    rng = np.random.default_rng(0)
    for _ in range(400):
        pretrain.clip_batch(rng, 8)
    del drawn[1::2]  # the twins
    held = [{c for s in b for c in (s.background, *(x for t in s.things for x in (t.colour, t.second)))} for b in drawn]
    hard = [len(c) <= 3 for c in held]
    assert abs(np.mean(hard) - 0.5) < 6 * 0.5 / 400**0.5
    assert len({frozenset(c) for c, h in zip(held, hard) if h}) > 20  # not always the same three
    assert min(len(c) for c, h in zip(held, hard) if not h) > 3


def test_a_twin_shows_the_first_thing_elsewhere_and_as_well_done(drawn):
    images, _, twins = pretrain.clip_batch(np.random.default_rng(3), 200)
    moved = 0
    for s, t, x, y in zip(*drawn, images, twins):
        a, b = s.things[0], t.things[0]
        assert (a.shape, a.colour, a.pattern, a.second) == (b.shape, b.colour, b.pattern, b.second)
        assert t.background not in (b.colour, b.second)
        moved += (a.x, a.y, a.size) != (b.x, b.y, b.size)
        careless = [not torch.equal(p, world.draw([q])[0]) for p, q in ((x, s), (y, t))]
        assert careless[0] == careless[1]
    assert moved > 100 and len({t.background for t in drawn[1]}) == len(world.COLOURS)


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


def test_pretraining_runs_from_nothing_to_a_model_that_samples(tmp_path, monkeypatch):
    """A few updates of each part; the files that it leaves are those that the main job loads."""
    small = "--clip-steps 3 --clip-batch 8 --unet-steps 3 --unet-batch 4 --out"
    contrasted, loss = [], pretrain.clip_loss
    with monkeypatch.context() as patch:
        patch.setattr(
            pretrain, "clip_loss", lambda a, b, s: contrasted.append((a.detach(), b.detach())) or loss(a, b, s)
        )
        pretrain.main(["--small", *small.split(), str(tmp_path)])
    for (image, text), (again, twin) in zip(contrasted[::2], contrasted[1::2], strict=True):
        assert torch.equal(image, again) and not torch.equal(image, twin) and not torch.equal(text, twin)
    figures = json.loads((tmp_path / "pretrain.json").read_text())
    assert list(figures) == ["clip", "unet"] and {p.name for p in tmp_path.glob("*.pt")} == {"clip.pt", "unet.pt"}
    pipe, prompts = Pipeline.load(tmp_path), scene_prompts(0, 0, 2)
    assert torch.isfinite(pipe.complete(pipe.unet, prompts, Sampling(2), seed=0, stream=0)).all()
    more = tmp_path / "more"  # trained on: from those weights, with other scenes and noise
    (more).mkdir()
    (more / "clip.pt").write_bytes((tmp_path / "clip.pt").read_bytes())
    onward = "--only unet --unet-steps 1 --unet-batch 4 --unet-lr 0 --ema 0"
    drawn, noises = [], []
    batch, noisy = pretrain.unet_batch, pretrain.add_noise
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "unet_batch", lambda *a: drawn.append(batch(*a)) or drawn[-1])
        patch.setattr(pretrain, "add_noise", lambda s, x, noise, t: noises.append(noise) or noisy(s, x, noise, t))
        pretrain.main(["--small", *onward.split(), "--out", str(more), "--start-from", str(tmp_path)])
        fresh = tmp_path / "fresh"
        fresh.mkdir()
        (fresh / "clip.pt").write_bytes((tmp_path / "clip.pt").read_bytes())
        pretrain.main(["--small", *onward.split(), "--out", str(fresh)])
    assert len(drawn) == 2 and not torch.equal(drawn[0][0], drawn[1][0]) and not torch.equal(*noises)
    first, second = (torch.load(p / "unet.pt", weights_only=True) for p in (tmp_path, more))
    assert [s["steps"] for s in second["meta"]["stages"]] == [3, 1] and len(first["meta"]["stages"]) == 1
    assert all(torch.equal(first["state"][k], second["state"][k]) for k in first["state"])
    assert second["meta"]["stages"][1]["command"].endswith(f"--out {more} --start-from {tmp_path}")
    assert second["meta"]["stages"][1]["unet_lr"] == 0 and second["meta"]["clip"] == first["meta"]["clip"]
    assert not list(tmp_path.rglob("*unfinished*"))
    before = {p: p.read_bytes() for p in tmp_path.glob("*.pt")}
    for only in ("all", "clip", "unet"):  # earlier weights are never overwritten
        with pytest.raises(ValueError, match="holds a .*.pt already; name another folder"):
            pretrain.main(["--small", *small.split(), str(tmp_path), "--only", only])
    assert before == {p: p.read_bytes() for p in tmp_path.glob("*.pt")}
    broken = tmp_path / "broken"  # an interrupted run can be trained on
    broken.mkdir()
    (broken / "unet-unfinished.pt").write_bytes((tmp_path / "unet.pt").read_bytes())
    (tmp_path / "on").mkdir()
    (tmp_path / "on" / "clip.pt").write_bytes((tmp_path / "clip.pt").read_bytes())
    pretrain.main(["--small", *onward.split(), "--out", str(tmp_path / "on"), "--start-from", str(broken)])
    assert len(torch.load(tmp_path / "on" / "unet.pt", weights_only=True)["meta"]["stages"]) == 2
    again = tmp_path / "again"
    pretrain.main(["--small", *small.split(), str(again)])
    for name in ("clip.pt", "unet.pt"):  # the same seed gives the same weights
        a, b = (torch.load(p / name, weights_only=True)["state"] for p in (tmp_path, again))
        assert all(torch.equal(a[k], b[k]) for k in a), name


@pytest.mark.slow
def test_pretraining_makes_no_reward_model_and_prints_the_two_commands_that_use_one(tmp_path, monkeypatch, capsys):
    """Both are run as printed, each with flags that make it small."""
    out = tmp_path / "base"
    small = "--clip-steps 1 --clip-batch 4 --unet-steps 1 --unet-batch 4 --threads 1"
    pretrain.main(["--small", *small.split(), "--out", str(out)])
    assert {p.name for p in out.iterdir()} == {"clip.pt", "unet.pt", "pretrain.json"}
    printed = capsys.readouterr().out.splitlines()[-1]
    (to_rate, rate), (to_align, align) = re.findall(r"python (train_\w+\.py) ([^;]*)", printed)
    assert (to_rate, to_align) == ("train_reward.py", "train_rl.py")
    rate, align = shlex.split(rate), shlex.split(align)
    assert rate[:4] == align[:3] + rate[3:4] == ["--small", "--weights", str(out), "--out"]
    assert align[3:] == ["--reward", f"model:{rate[4]}"]
    tiny = "--prompts 24 --samples 2 --sampling-steps 2 --epochs 1 --dim 8 --threads 1"
    monkeypatch.setattr(sys, "argv", [to_rate, *rate, *tiny.split()])
    train_reward.main()
    few = [str(x) for pair in TINY.items() for x in pair]
    monkeypatch.setattr(sys, "argv", [to_align, *align, *few, "--out", str(tmp_path / "rl")])
    train_rl.main()
    assert (tmp_path / "rl" / "last.pt").exists()
    stops_with(lambda: pretrain.main(["--small", "--only", "reward"]), "choose from all, clip, unet", capsys)


def test_weights_without_a_reward_model_are_told_the_command_that_makes_one(tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "base", tmp_path / "rl"
    folder.mkdir()
    for name in ("clip.pt", "unet.pt"):
        (folder / name).symlink_to(SHIPPED / name)
    stops_with(
        lambda: train_tiny(out, monkeypatch, weights=folder), f"train_reward.py --small --weights {folder}", capsys
    )
    assert not out.exists()


def test_encoders_are_trained_on_without_changing_what_the_unet_reads(tmp_path):
    """The text states under its condition stay bit for bit; both embeddings change; the UNet still takes the file."""
    onward = "--only clip --seed 5 --clip-steps 2 --clip-batch 8 --clip-lr 0.1"
    pretrain.main(["--small", *onward.split(), "--out", str(tmp_path), "--start-from", str(SHIPPED)])
    (tmp_path / "unet.pt").write_bytes((SHIPPED / "unet.pt").read_bytes())
    before, after = Pipeline.load(None), Pipeline.load(tmp_path)
    ids, images = before.tokenizer(["a red circle", "a [V] star on a blue background"]), torch.rand(2, 3, 32, 32)
    assert torch.equal(before.clip.context(ids), after.clip.context(ids))
    assert not torch.allclose(before.clip.encode_text(ids), after.clip.encode_text(ids), atol=1e-4)
    assert not torch.allclose(before.clip.encode_image(images), after.clip.encode_image(images), atol=1e-4)
    stages = json.loads((tmp_path / "pretrain.json").read_text())["clip"]["stages"]
    assert stages[-1]["steps"] == 2 and stages[-1]["seed"] == 5


@pytest.mark.parametrize(
    "flags,said",
    [
        ("--only all --start-from {shipped} --out {out}", "--start-from needs --only clip or --only unet"),
        ("--only unet --start-from {out} --out {out}", "--out and --start-from are the same folder"),
        ("--only unet --start-from {epsilon} --out {out}", "another noise schedule"),
        ("--only unet --start-from {heads} --out {out}", "configured differently"),
        ("--only unet --start-from {run} --out {out}", "does not say how it was trained"),
        ("--only unet --start-from {shipped} --out {other}", "another clip.pt"),
    ],
)
def test_a_base_that_cannot_be_trained_on_is_refused(tmp_path, flags, said):
    """Another configuration, schedule or text encoder; the output folder is as it was."""
    shipped = torch.load(SHIPPED / "unet.pt", weights_only=True)
    epsilon = shipped["meta"]["schedule"] | {"prediction_type": "epsilon"}
    changed = {
        "epsilon": shipped | {"meta": shipped["meta"] | {"schedule": epsilon}},
        "heads": shipped | {"config": shipped["config"] | {"attention_head_dim": 2}},
        "run": shipped | {"meta": {k: v for k, v in shipped["meta"].items() if k != "stages"}},
    }
    folders = {"shipped": SHIPPED, "out": tmp_path / "out", "other": tmp_path / "other"}
    for name, content in changed.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        torch.save(content, folders[name] / "unet.pt")
    for name in ("out", "other"):
        folders[name].mkdir()
        (folders[name] / "clip.pt").write_bytes((SHIPPED / "clip.pt").read_bytes())
    clip = torch.load(SHIPPED / "clip.pt", weights_only=True)
    clip["state"] = {k: v + 1 if k == "text_model.final_layer_norm.bias" else v for k, v in clip["state"].items()}
    torch.save(clip, folders["other"] / "clip.pt")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.pt")}
    with pytest.raises(ValueError, match=said):
        pretrain.main(["--small", "--unet-steps", "1", *flags.format(**folders).split()])
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*.pt")}
    with pytest.raises(ValueError, match="another clip.pt"):  # nor is it loaded beside an encoder that it never saw
        (folders["other"] / "unet.pt").write_bytes((SHIPPED / "unet.pt").read_bytes())
        Pipeline.load(folders["other"])


def test_a_damaged_record_of_figures_is_named(tmp_path):
    (tmp_path / "pretrain.json").write_text('{"clip": ')
    with pytest.raises(ValueError, match="pretrain.json"):
        pretrain.main(["--small", "--only", "clip", "--clip-steps", "1", "--clip-batch", "4", "--out", str(tmp_path)])
