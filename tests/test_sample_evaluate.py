"""The commands around a run: `sample` and `evaluate`, on the shipped weights; and those weights themselves."""

import math
import re

import numpy as np
import pytest
import torch
from helpers import stops_with
from PIL import Image

from minipref import evaluate, sample
from minipref.data.prompts import scene_prompts
from minipref.data.scenes import HELD_OUT_WORLD, draw, scenes, world
from minipref.diffusion import ddim_step, predict
from minipref.pipeline import SHIPPED, Pipeline, Sampling
from minipref.runtime import checkpoint


def test_sample_shows_base_beside_aligned_and_keeps_known_pixels(run, tmp_path):
    folder, _ = run
    rng, out = np.random.default_rng(0), tmp_path / "s.png"
    picture, mask = rng.integers(0, 255, (32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(picture).save(tmp_path / "p.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    own = ["--image", str(tmp_path / "p.png"), "--mask", str(tmp_path / "m.png"), "--prompt", "a red circle"]
    sample.main(["--run", str(folder), "--count", "2", "--out", str(out), *own])
    made = {p.name: np.asarray(Image.open(p)) for p in (tmp_path / "s").iterdir()}
    assert sorted(made) == ["aligned_00.png", "aligned_01.png", "base_00.png", "base_01.png"]
    for name, x in made.items():
        assert np.array_equal(x[:, :20], picture[:, :20]), name
    assert (made["base_00.png"] != made["aligned_00.png"]).any() and (made["base_00.png"] != made["base_01.png"]).any()
    assert Image.open(out).size[0] > 200
    for given in ("p.png", "m.png"):
        before = (tmp_path / given).read_bytes()
        with pytest.raises(ValueError, match=f"{given}: is the picture to be read"):
            sample.main(["--run", str(folder), "--out", str(tmp_path / given), *own])
        assert (tmp_path / given).read_bytes() == before


def test_sample_needs_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--full", "--prompt", "a red circle on a blue background", "--count", "2", "--steps", "2"]
    sample.main(flags)
    assert (tmp_path / "sample.png").exists() and len(list((tmp_path / "sample").iterdir())) == 2
    mine = tmp_path / "mine"
    mine.mkdir()
    changed = torch.load(SHIPPED / "unet.pt", weights_only=True)
    changed["state"]["conv_out.bias"] += 1
    torch.save(changed, mine / "unet.pt")
    (mine / "clip.pt").write_bytes((SHIPPED / "clip.pt").read_bytes())
    sample.main([*flags, "--weights", str(mine), "--out", "mine.png"])
    assert (tmp_path / "mine.png").read_bytes() != (tmp_path / "sample.png").read_bytes()


def test_evaluate_reports_both_models_and_the_base_against_itself(run, capsys):
    folder, _ = run
    evaluate.main(["--run", str(folder), "--prompts", "16", "--best-of", "3", "--steps", "2"])
    text = (folder / "evaluation.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out and (folder / "evaluation.png").exists()
    assert (
        text.count("| base against itself |") == text.count("| aligned against base |") == 4
    )  # two judges, S = 1 and 3
    assert "nats" in text


def test_evaluate_without_a_run_judges_text_to_image(capsys, tmp_path):
    """The shipped weights, and those of a folder; with every true picture in place of the model's, all is obeyed."""
    evaluate.main(["--prompts", "8", "--steps", "2"])
    text = capsys.readouterr().out
    assert text.count("| things | captions | background | shape | colour | second | all |") == 2
    assert "guidance 5, seed 0" in text
    for name in ("unet.pt", "clip.pt"):
        (tmp_path / name).write_bytes((SHIPPED / name).read_bytes())
    evaluate.main(["--prompts", "8", "--steps", "2", "--weights", str(tmp_path)])
    assert capsys.readouterr().out == text
    with pytest.MonkeyPatch.context() as patch:
        batch = scenes(world(HELD_OUT_WORLD, 0), 0, 16)
        patch.setattr(Pipeline, "complete", lambda *a, **k: draw(batch))
        evaluate.main(["--prompts", "16"])
        assert capsys.readouterr().out.count("| any | 16 | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 |") == 2
        patch.setattr(Pipeline, "complete", lambda *a, **k: torch.zeros(16, 3, 32, 32))
        evaluate.main(["--prompts", "16"])
        assert re.search(r"\| any \| 16 \| 0\.\d+ \| 0\.000 \| 0\.000 \|", capsys.readouterr().out)
    with pytest.raises(ValueError, match="--weights: belongs to text-to-image"):
        evaluate.main(["--run", "x", "--weights", str(tmp_path)])


def test_the_base_against_itself_wins_s_of_s_plus_one(tmp_path, run):
    """A run whose last.pt is the base model. 96 prompts; bounds of 5.5 standard errors, false alarm 1e-7 in all."""
    folder, twin = run[0], tmp_path / "twin"
    twin.mkdir()
    (twin / "config.json").write_text((folder / "config.json").read_text())
    pipe = Pipeline.load(None)
    meta = torch.load(folder / "last.pt", weights_only=True)["meta"]
    checkpoint.save(twin / "last.pt", "unet", pipe.unet.config, pipe.unet.state_dict(), meta=meta)
    evaluate.main(["--run", str(twin), "--prompts", "96", "--steps", "2"])
    text = (twin / "evaluation.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| (base against itself|aligned against base) \| (\d+) \| ([\d.]+) \|", text)
    assert len(rows) == 2 * 2 * 3
    for _, s, rate in rows:
        expected = int(s) / (int(s) + 1)
        assert abs(float(rate) - expected) < 5.5 * math.sqrt(expected * (1 - expected) / 96), (s, rate)
    assert "rollout: 0.00 nats" in text


def test_the_table_counts_each_models_wins_over_the_same_opponent():
    base, aligned = torch.tensor([[1.0, 9.0], [1.0, 1.0]]), torch.tensor([[3.0, 3.0], [2.0, 0.0]])
    lines = evaluate.table("gold", base, torch.tensor([2.0, 2.0]), aligned, [1, 2])[2:]
    rates = [float(line.split("|")[3]) for line in lines]
    assert rates == [0.0, 0.5, 0.75, 0.75]


def test_the_kl_of_a_rollout_is_the_mean_log_ratio_of_its_paths():
    """Closed form against Monte Carlo: E[log p − log q] over 96 paths; 6 standard errors, false alarm 2e-9."""
    import copy

    pipe, prompts = Pipeline.load(None), scene_prompts(4, 0, 96)
    moved = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        moved.conv_out.bias += 0.02
    how = Sampling(3)
    exact = evaluate.path_kl(pipe, moved, prompts, how, seed=0)
    path, condition = pipe.sample(moved, prompts, how, 0, 3, range(96)), pipe.condition(prompts)
    n, total = path.latents[0, 0].numel(), torch.zeros(96)
    for i in range(2):
        t, t_prev = path.times(i)
        x, following = path.latents[:, i], path.latents[:, i + 1]
        with torch.no_grad():
            p, q = (ddim_step(pipe.schedule, predict(u, x, t, condition), x, t, t_prev, eta=1.0, x_prev=following)[1]
                    for u in (moved, pipe.unet))  # fmt: skip
        total += n * (p - q)
    assert exact.mean() > 1 and (total - exact).mean().abs() < 6 * (total - exact).std() / 96**0.5


def test_a_run_is_only_compared_with_the_base_model_that_it_came_from(run, tmp_path, capsys):
    folder, other = run[0], tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((folder / "config.json").read_text())
    content = torch.load(folder / "last.pt", weights_only=True)
    content["meta"]["base"] = "another"
    torch.save(content, other / "last.pt")
    stops_with(lambda: sample.main(["--run", str(other)]), "trained from another base model", capsys)


@pytest.mark.parametrize("command", [sample.main, evaluate.main])
def test_a_damaged_run_is_one_line(command, run, tmp_path, capsys):
    folder, _ = run
    stops_with(lambda: command(["--run", str(tmp_path / "none")]), "no run lies there", capsys)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    stops_with(lambda: command(["--run", str(broken)]), "last.pt: no such checkpoint", capsys)
    half = (folder / "last.pt").read_bytes()
    (broken / "last.pt").write_bytes(half[: len(half) // 2])
    stops_with(lambda: command(["--run", str(broken)]), "last.pt: cannot be read as a checkpoint", capsys)
    assert sorted(p.name for p in broken.iterdir()) == ["config.json", "last.pt"]


def test_image_and_mask_of_different_sizes_are_one_line(run, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "p.png")
    Image.new("L", (16, 32), 255).save(tmp_path / "m.png")
    own = ["--image", str(tmp_path / "p.png"), "--mask", str(tmp_path / "m.png")]
    stops_with(lambda: sample.main(["--run", str(run[0]), *own]), "16×32 pixels but the picture 32×32", capsys)
    stops_with(lambda: sample.main(["--mask", "m.png"]), "--mask needs the --image", capsys)


def test_the_shipped_weights_fit_their_limit_and_fill_holes_plausibly():
    """A filled hole is nearer to the true scene than grey is, on 32 held-out prompts; the reward model ranks clean
    fills above sloppy ones of the same prompt."""
    from minipref.data.scenes import HELD_OUT_WORLD, sloppy, world
    from minipref.pipeline import learned_reward

    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) < 6e6
    pipe, prompts = Pipeline.load(None), scene_prompts(world(HELD_OUT_WORLD, 5), 0, 32)
    made = pipe.complete(pipe.unet, prompts, Sampling(6), seed=0, epoch=0)
    hole = prompts.masks

    def error(x):
        return ((x - prompts.images).abs() * hole).sum() / hole.sum()

    assert error(made) < 0.6 * error(prompts.masked)
    model = learned_reward(None)
    clean, spoilt = (model(x, prompts).value for x in (prompts.images, prompts.paste_known(sloppy(prompts.images))))
    assert (clean > spoilt).float().mean() > 0.9


def test_completions_do_not_depend_on_how_the_batch_is_split():
    pipe, prompts = Pipeline.load(None), scene_prompts(8, 0, 6)
    whole = pipe.complete(pipe.unet, prompts, Sampling(3), seed=1, epoch=2)
    parts = pipe.complete(pipe.unet, prompts, Sampling(3), seed=1, epoch=2, batch=4)
    assert torch.allclose(whole, parts, atol=1e-4)
    late = pipe.complete(pipe.unet, prompts.select([4, 5]), Sampling(3), seed=1, epoch=2, first=4)
    assert torch.allclose(whole[4:], late, atol=1e-4)
