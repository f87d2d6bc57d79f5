"""RPO, small enough to run in seconds, on the shipped weights."""

import json
import math
import re
import shutil
import sys
from collections import Counter
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from helpers import rpo_weights as weights
from helpers import same, stops_with
from helpers import train_rpo_tiny as train
from PIL import Image

import train_rpo
from minipref import figures
from minipref.commands import sample
from minipref.data.pictures import read_image
from minipref.data.prompts import text_prompts
from minipref.data.subjects import SubjectPrompt
from minipref.pipeline import SHIPPED, Pipeline, Sampling, load_unet
from minipref.rewards import SubjectReward, harmonic
from minipref.runtime.config import parse, run_main
from minipref.runtime.runlog import RunFolder
from minipref.toy import world
from minipref.toy.subjects import Placement, prompt_lists, toy_subject

SUBJECT = toy_subject(0, 32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    before = [(SHIPPED / f"{k}.pt").read_bytes() for k in ("unet", "clip")]
    summary = train(folder)
    assert before == [(SHIPPED / f"{k}.pt").read_bytes() for k in ("unet", "clip")]
    return folder, summary


def test_the_defaults_are_rpos_and_small_is_the_table_of_deviations():
    """PAPERS.md B2 to B4: 8 × 4 training pictures, 400 updates of one pair, labels drawn by the prompt alone at
    temperature 1, validation of 8 × 4 pictures every 40 updates, 25 × 4 test pictures, no stop before the end."""
    defaults = asdict(train_rpo.RPOConfig())
    paper = {
        "train_prompts": 8, "images": 4, "lam_train": 0, "label_temperature": 1, "soft_labels": False,
        "reference_prompt": "modified", "share_noise": False, "mode": "rpo", "beta": 1, "updates": 400, "batch_size": 1,
        "lr": 5e-6, "weight_decay": 0.01, "mean": "harmonic", "val_prompts": 8, "val_images": 4, "val_every": 40,
        "patience": 0, "test_prompts": 25, "test_images": 4, "guidance": 7.5,
    }  # fmt: skip
    assert {k: defaults[k] for k in paper} == paper and defaults["lam_val"] in (0.3, 0.5, 0.7)
    small = {
        "lam_train": 0.5, "soft_labels": True, "batch_size": 4, "lr": 5e-4, "patience": 4, "guidance": 3,
        "test_images": 2,
    }  # fmt: skip
    assert train_rpo.PRESETS == {"small": small} and all(defaults[k] != v for k, v in small.items())
    for flags, changes in (([], {}), (["--no-soft-labels", "--lr", "1e-3"], {"soft_labels": False, "lr": 1e-3})):
        argv = ["--small", *flags]
        parsed = parse(train_rpo.RPOConfig, argv, prog="x", description="", presets=train_rpo.PRESETS)
        assert asdict(parsed) == defaults | small | {"preset": "small"} | changes


def test_a_run_leaves_summary_pictures_and_weights(run):
    folder, summary = run
    rows = {"clip_i", "clip_t", *(f"harmonic_{v}" for v in (0.3, 0.5, 0.7))}
    rows |= {f"true_{k}" for k in ("subject", "background", "second", "all")}
    for key in rows:
        assert set(summary[key]) == {"base", "last", "best", "best 0.3", "best 0.5", "best 0.7"}
        assert all(-1 <= v <= 1 for v in summary[key].values())
    assert {"best_step", "last_step", "subject", "seconds", "peak_memory_mb", "seed", "judged"} <= set(summary)
    for name in ("grid.png", "curves.png", "samples/000000.png", "samples/000004.png"):
        assert Image.open(folder / name).size[0] > 200
    assert not same(weights(folder), load_unet(SHIPPED / "unet.pt")[0].state_dict())
    config = json.loads((folder / "config.json").read_text())
    assert (config["script"], config["preset"], config["batch_size"]) == ("train_rpo.py", "small", 2)


@pytest.mark.slow
def test_each_lambda_keeps_and_judges_the_best_of_the_steps_that_were_validated(tmp_path, monkeypatch):
    """Each lambda's reward is given a peak of its own; best.pt, drawn and scored again, is the one of lambda_val's.

    The table compares base, last and best on test prompts and noise of their own; the grid shows the same pictures.
    """
    peaks, kept, calls, grids, curves = {0.3: 4, 0.5: 6, 0.7: 8}, {0.5: 6, 0.7: 8}, Counter(), [], []

    def peaked(I, T, lam):
        step = 2 * calls[lam]
        calls[lam] += 1
        return harmonic(I, T, lam) - (abs(step - peaks[lam]) if lam in peaks and step <= 12 else 0)  # later: the table

    monkeypatch.setattr(train_rpo, "harmonic", peaked)
    monkeypatch.setattr(train_rpo, "rpo_grid", lambda *a: grids.append(a))
    monkeypatch.setattr(train_rpo, "rpo_curves", lambda *a: curves.append(a[1:]))
    pipe, (_, validation, test) = Pipeline.load(None), prompt_lists(SUBJECT, 0, (2, 2, 3))

    def drawn(file, prompts, stream):
        texts = [p.text for p in prompts for _ in range(2)]  # two pictures of a prompt, one after the other
        made = pipe.complete(load_unet(file)[0], text_prompts(texts), Sampling(2, 0.0, 3.0), seed=0, stream=stream)
        return made, *SubjectReward(pipe.clip, pipe.tokenizer, SUBJECT.references)(made, texts)

    summaries = {}
    for lam_val in kept:
        calls.clear()
        folder = tmp_path / str(lam_val)
        summary = train(folder, updates=12, patience=0, lam_val=lam_val, lam_train=0.4)  # not one that is counted
        summaries[lam_val] = summary
        rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        for lam, peak in peaks.items():
            found = {r["step"]: r[f"val_{lam}"] for r in rows if f"val_{lam}" in r}
            assert list(found) == [0, 2, 4, 6, 8, 10, 12]
            assert summary["steps"][f"best {lam}"] == peak == max(found, key=found.get)
        assert summary["best_step"] == kept[lam_val] and summary["last_step"] == 12
        assert load_unet(folder / "best.pt")[2]["step"] == kept[lam_val]
        assert curves.pop() == (lam_val, "harmonic", kept[lam_val])
        around = (kept[lam_val] - 2, kept[lam_val], kept[lam_val] + 2)
        logged = [next(r["val_0.5"] for r in rows if r["step"] == k) + abs(k - 6) for k in around]
        again = harmonic(*drawn(folder / "best.pt", validation, -11)[1:], 0.5).mean().item()
        assert again == pytest.approx(logged[1], abs=1e-5) and min(abs(again - logged[i]) for i in (0, 2)) > 1e-4
        shown = grids.pop()[3]
        for name, file in (("base", SHIPPED / "unet.pt"), ("last", folder / "last.pt"), ("best", folder / "best.pt")):
            made, I, T = drawn(file, test, -12)
            found = [summary[k][name] for k in ("clip_i", "clip_t", "harmonic_0.3")]
            expected = [2 * I.mean() - 1, 2 * T.mean() - 1, harmonic(I, T, 0.3).mean()]
            assert found == pytest.approx([v.item() for v in expected], abs=1e-5)
            assert torch.allclose(shown[name], made[::2], atol=1e-4)  # the first of each prompt
            true = train_rpo.true_measures(made, SUBJECT, test, "true")
            assert {k: summary[k][name] for k in true} == pytest.approx(true)
    # The two runs differ in what they keep alone: what one calls its best is a column of the other's.
    a, b = summaries[0.5], summaries[0.7]
    for key in ("clip_i", "harmonic_0.5"):
        assert a[key]["best 0.5"] == a[key]["best"] == pytest.approx(b[key]["best 0.5"])
        assert b[key]["best 0.7"] == b[key]["best"] == pytest.approx(a[key]["best 0.7"])
        assert a[key]["best 0.3"] == pytest.approx(b[key]["best 0.3"])
        assert len({round(v, 5) for v in a[key].values()}) == 5  # base, last and three lambdas' steps


def test_true_measures_are_shares_of_the_pictures_whose_prompts_ask():
    """Two prompts, two pictures each; the second prompt names no background, no prompt names a second thing."""
    thing = SUBJECT.truth
    free = [c for c in world.COLOURS if c not in (thing.colour, thing.second)]
    other = replace(thing, colour=free[2], second=free[3])
    shown = [(free[0], thing), (free[1], thing), (free[1], thing), (free[1], other)]  # right, wrong, right, wrong
    images = world.draw([world.Scene(c, (replace(t, x=16.0, y=16.0),)) for c, t in shown])
    prompts = [SubjectPrompt("…", Placement(background=free[0])), SubjectPrompt("…", Placement())]
    found = train_rpo.true_measures(images, SUBJECT, prompts, "true")
    assert math.isnan(found.pop("true_second"))
    assert found == {"true_subject": 0.75, "true_background": 0.5, "true_all": 0.5}
    assert train_rpo.true_measures(images, replace(SUBJECT, truth=None), prompts, "true") == {}


def test_the_curves_show_the_deciding_reward_and_mark_the_kept_step(tmp_path, monkeypatch):
    panels, folder = [], RunFolder(str(tmp_path / "x"), "", {}, "train_rpo.py")
    monkeypatch.setattr(figures, "curves", lambda given, path: panels.extend(given))
    for step in (0, 2, 4):
        folder.log(step=step, **{"val_0.3": step / 10, "val_0.7": 1 - step / 10, "val_t": 0.5})
    figures.rpo_curves(folder, 0.7, "harmonic", 2)
    decided, kept = panels[0].series
    assert "lambda 0.7" in panels[0].title
    assert (decided.x, decided.y, kept.x, kept.y) == ([0, 2, 4], [1, 0.8, 0.6], [2], [0.8])


def test_a_prompt_that_the_text_encoder_would_cut_short_is_refused(run, tmp_path, capsys):
    long = "a small red star " * 6 + "and a [V] mug"
    folder, prompts = tmp_path / "mug", tmp_path / "prompts.txt"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32), (80 * i, 200, 30)).save(folder / f"{i}.png")
    prompts.write_text("\n".join([*(f"a [V] mug {w}" for w in "abcd"), long]))
    with pytest.raises(ValueError, match="and a .V. mug': the text encoder reads 22 words; shorten it"):
        train(tmp_path / "x", "--references", str(folder), "--class-name", "mug", "--prompt-file", str(prompts))
    assert not (tmp_path / "x").exists()
    argv = ["--run", str(run[0]), "--prompt", long]
    stops_with(lambda: sample.main(argv), "--prompt: the text encoder reads 22 words; shorten it", capsys)
    argv = ["--guidance", "-0.5", "--out", str(tmp_path / "x.png")]
    stops_with(lambda: sample.main(argv), "--guidance -0.5: 0 or more, or -1 for the run's own", capsys)


@pytest.mark.slow
def test_learning_makes_the_pictures_more_like_the_subject(tmp_path):
    summary = train(tmp_path / "x", updates=40, val_every=40, batch_size=4, mode="similarity", sampling_steps=6)
    assert summary["clip_i"]["last"] > summary["clip_i"]["base"] + 0.1


def test_photos_run_end_to_end_and_say_what_the_encoder_cannot_read(tmp_path, capsys):
    folder = tmp_path / "cup"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 200, 30)).save(folder / f"{i}.jpg")
    (folder / "3.jpg").write_text("no picture")
    argv = ["--references", str(folder), "--class-name", "cup", "--mean", "arithmetic", "--label-temperature", "0.1"]
    summary = train(tmp_path / "x", *argv, lam_val=0.4)
    out = capsys.readouterr().out
    assert "has never seen: " in out and "true_all" not in summary
    assert re.search(r"^skipped .*3\.jpg: not a readable picture", out, re.M)
    rows = [json.loads(x) for x in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    judged = [r for r in rows if "val_i" in r]
    assert len(judged) == 3  # the arithmetic mean is linear
    assert all(r["val_0.4"] == pytest.approx(0.4 * r["val_i"] + 0.6 * r["val_t"], abs=1e-6) for r in judged)
    assert summary["subject"] == "cup" and set(summary["harmonic_0.4"]) == {
        "base", "last", "best", "best 0.3", "best 0.4", "best 0.5", "best 0.7"
    }  # fmt: skip


def test_the_first_preference_loss_is_log_two(run):
    rows = [json.loads(x) for x in (run[0] / "metrics.jsonl").read_text().splitlines()]
    first = next(r for r in rows if "preference" in r)
    assert first["preference"] == pytest.approx(0.693147, abs=1e-5) and first["margin"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(run, tmp_path):
    again = train(tmp_path / "again")
    assert same(weights(run[0]), weights(tmp_path / "again"))
    assert (run[0] / "metrics.jsonl").read_text() == (tmp_path / "again" / "metrics.jsonl").read_text()
    assert {k for k in again if again[k] != run[1][k]} <= {"seconds", "peak_memory_mb"}
    train(tmp_path / "other", seed=1)
    assert not same(weights(run[0]), weights(tmp_path / "other"))


def test_similarity_alone_is_beta_zero(run, tmp_path):
    train(tmp_path / "alone", mode="similarity")
    train(tmp_path / "zero", beta=0)
    assert same(weights(tmp_path / "alone"), weights(tmp_path / "zero"))
    assert not same(weights(tmp_path / "alone"), weights(run[0]))


def test_labels_depend_on_lambda(run, tmp_path):
    train(tmp_path / "x", lam_train=0)
    assert not same(weights(tmp_path / "x"), weights(run[0]))


@pytest.mark.parametrize(
    "flags,beta,said",
    [
        (["--mode", "similarity", "--share-noise"], 1, "--share-noise: belongs to pairs, and --mode similarity"),
        (["--mode", "dreambooth", "--lam-train", "0.25"], 1, "--lam-train: belongs to pairs, and --mode dreambooth"),
        (["--mode", "similarity"], 3, "--beta: belongs to pairs, and --mode similarity compares none"),
        (["--mode", "preference"], 0, "--beta 0: --mode preference would learn nothing"),
    ],
)
def test_a_choice_that_would_do_nothing_is_refused(tmp_path, flags, beta, said):
    with pytest.raises(ValueError, match=said):
        train(tmp_path / "x", *flags, beta=beta)
    assert not (tmp_path / "x").exists()


def test_it_stops_when_no_lambda_has_improved_for_a_while(tmp_path):
    """With learning rate 0 nothing ever improves."""
    summary = train(tmp_path / "x", lr=0, updates=20, patience=2)
    assert summary["last_step"] == 4 and summary["best_step"] == 0


def test_it_goes_on_while_the_reward_of_any_lambda_improves(tmp_path, monkeypatch):
    """Only that of 0.7 does, up to step 8; two validations later the run ends."""
    calls = Counter()

    def rising(I, T, lam):
        calls[lam] += 1
        return torch.full_like(I, min(calls[lam], 5) if lam == 0.7 else 0.5)

    monkeypatch.setattr(train_rpo, "harmonic", rising)
    summary = train(tmp_path / "x", mode="similarity", updates=20, patience=2, lam_val=0.3)
    assert summary["last_step"] == 12 and summary["best_step"] == 0 and summary["steps"]["best 0.7"] == 8


def test_sample_places_the_subject_by_a_prompt(run, tmp_path, capsys):
    argv = ["--run", str(run[0]), "--count", "2", "--out"]
    sample.main([*argv, str(tmp_path / "x.png"), "--prompt", "a [V] circle on a red background"])
    assert Image.open(tmp_path / "x.png").size[0] > 150 and (tmp_path / "x" / "aligned_01.png").is_file()
    for more, said in ((["--prompt", "a circle"], "name the subject by [V]"), ([], "say --prompt")):
        with pytest.raises(SystemExit) as stop:
            run_main("minipref", partial(sample.main, [*argv, str(tmp_path / "y.png"), *more]))
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_sample_draws_with_the_kept_weights_as_the_run_did(run, tmp_path):
    """best.pt, not last.pt; guidance 3, eta 0 and 2 steps are the run's own."""
    folder, prompt = tmp_path / "run", "a [V] circle on a red background"
    shutil.copytree(run[0], folder)
    train(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / "last.pt", folder / "best.pt")
    sample.main(["--run", str(folder), "--prompt", prompt, "--count", "2", "--out", str(tmp_path / "x.png")])
    pipe = Pipeline.load(None)
    best, last = (load_unet(folder / f"{name}.pt")[0] for name in ("best", "last"))
    for unet, name, apart in ((best, "aligned", False), (last, "aligned", True), (pipe.unet, "base", False)):
        made = pipe.complete(unet, text_prompts([prompt] * 2), Sampling(2, 0.0, 3.0), seed=0, stream=0)
        written = torch.stack([read_image(tmp_path / "x" / f"{name}_{i:02d}.png", None) for i in range(2)])
        assert torch.allclose(written, made.clamp(0, 1), atol=0.01) != apart


def test_every_subject_and_seed_has_noise_of_its_own(tmp_path, monkeypatch):
    seeds = []

    def complete(self, unet, prompts, sampling, *, seed, stream):
        seeds.append(seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "complete", complete)
    for case in ({"subject": 1}, {"subject": 0}, {"seed": 1}, {"seed": 1, "subject": 1}):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / str(len(seeds)), **case)
    assert len(set(seeds)) == 4


def test_the_grid_names_references_rows_and_prompts(tmp_path, monkeypatch):
    drawn = []
    true = figures.grid
    monkeypatch.setattr(figures, "grid", lambda rows, **more: drawn.append((rows, more)) or true(rows, **more))
    prompts = [SubjectPrompt(f"a [V] circle {i}") for i in range(10)]
    pictures = {k: torch.rand(10, 3, 32, 32) for k in ("base", "best")}
    figures.rpo_grid(tmp_path / "x.png", SUBJECT, prompts, pictures)
    assert [name for name, _ in drawn[0][0]] == ["references"] and drawn[0][1]["title"] == SUBJECT.name
    assert drawn[1][1]["columns"] == [p.text for p in prompts[:8]]
    assert all(name == k and torch.equal(x, pictures[k][:8]) for (name, x), k in zip(drawn[1][0], pictures))


def mean_colour(images):
    return images.mean((2, 3))


def no_embedding(images):
    return images.mean()


def test_a_further_judge_of_likeness_has_its_column_and_is_tried_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "my_encoder", sys.modules[__name__])
    grids = []
    monkeypatch.setattr(train_rpo, "rpo_grid", lambda *a: grids.append(a))
    summary = train(tmp_path / "x", image_encoder="my_encoder:mean_colour", test_images=1)
    for name, made in grids.pop()[3].items():
        x, y = (torch.nn.functional.normalize(mean_colour(v), dim=1) for v in (made, SUBJECT.references))
        assert summary["further_i"][name] == pytest.approx((x @ y.T).mean().item(), abs=1e-5)
    assert summary["further_i"]["base"] != summary["further_i"]["last"]
    printed = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:2] == "| "]
    columns = [k for k in summary if isinstance(summary[k], dict) and k != "steps"]
    assert [line[0] for line in printed[1:]] == list(summary["steps"]) and printed[0][-len(columns) :] == columns
    for name, step, *cells in printed[1:]:
        assert (step, cells) == (str(summary["steps"][name]), [f"{summary[k][name]:.3f}" for k in columns])
    with pytest.raises(ValueError, match=r"my_encoder:no_embedding: gave \(\), expected \(4, D\)"):
        train(tmp_path / "y", image_encoder="my_encoder:no_embedding")
    assert not (tmp_path / "y").exists()
