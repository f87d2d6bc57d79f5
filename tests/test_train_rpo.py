"""RPO, small enough to run in seconds, on the shipped weights."""

import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import rpo_weights as weights
from helpers import same, stops_with
from helpers import train_rpo_tiny as train
from PIL import Image

import train_rpo
from minipref import report, sample
from minipref.data import scenes
from minipref.data.folders import read_image
from minipref.data.prompts import text_prompts
from minipref.data.subjects import Placed, load_prompts, load_subject
from minipref.named_rewards import ImageJudge
from minipref.pipeline import SHIPPED, Pipeline, Sampling, load_unet
from minipref.rewards import SubjectReward, harmonic
from minipref.runtime.config import run_main
from minipref.runtime.runlog import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    before = [(SHIPPED / f"{k}.pt").read_bytes() for k in ("unet", "clip")]
    summary = train(folder)
    assert before == [(SHIPPED / f"{k}.pt").read_bytes() for k in ("unet", "clip")]
    return folder, summary


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
    pipe, (subject, _) = Pipeline.load(None), load_subject("", "", 0)
    lists = load_prompts(subject, "", False, "", (2, 2, 3), 0)

    def drawn(file, which):
        said = [p.text for p in lists[which] for _ in range(2)]  # two pictures of a prompt, one after the other
        noise = {"seed": 0, "epoch": -10 - which}
        made = pipe.complete(load_unet(file)[0], text_prompts(said), Sampling(2, 0.0, 3.0), **noise)
        return made, *SubjectReward(pipe.clip, pipe.tokenizer, subject.references)(made, said)

    summaries = {}
    for lam_val in kept:
        calls.clear()
        folder = tmp_path / str(lam_val)
        summary = train(folder, steps=12, patience=0, lam_val=lam_val, lam_train=0.4)  # not one that is counted
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
        again = harmonic(*drawn(folder / "best.pt", train_rpo.VALIDATE)[1:], 0.5).mean().item()
        assert again == pytest.approx(logged[1], abs=1e-5) and min(abs(again - logged[i]) for i in (0, 2)) > 1e-4
        shown = grids.pop()[3]
        for name, file in (("base", SHIPPED / "unet.pt"), ("last", folder / "last.pt"), ("best", folder / "best.pt")):
            made, I, T = drawn(file, train_rpo.TEST)
            found = [summary[k][name] for k in ("clip_i", "clip_t", "harmonic_0.3")]
            expected = [2 * I.mean() - 1, 2 * T.mean() - 1, harmonic(I, T, 0.3).mean()]
            assert found == pytest.approx([v.item() for v in expected], abs=1e-5)
            assert torch.allclose(shown[name], made[::2], atol=1e-4)  # the first of each prompt
            true = train_rpo.true_measures(made, subject, lists[train_rpo.TEST], 2, "true")
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
    subject, _ = load_subject("", "", 0)
    thing = subject.thing
    free = [c for c in scenes.COLOURS if c not in (thing.colour, thing.second)]
    other = replace(thing, colour=free[2], second=free[3])
    shown = [(free[0], thing), (free[1], thing), (free[1], thing), (free[1], other)]  # right, wrong, right, wrong
    images = scenes.draw([scenes.Scene(c, (replace(t, x=16.0, y=16.0),)) for c, t in shown])
    asked = [Placed("…", background=free[0]), Placed("…")]
    found = train_rpo.true_measures(images, subject, asked, 2, "true")
    assert found.pop("true_second") != found.get("true_second")  # NaN
    assert found == {"true_subject": 0.75, "true_background": 0.5, "true_all": 0.5}
    assert train_rpo.true_measures(images, replace(subject, thing=None), asked, 2, "true") == {}


def test_the_curves_show_the_deciding_reward_and_mark_the_kept_step(tmp_path, monkeypatch):
    panels, folder = [], RunFolder(str(tmp_path / "x"), "", {})
    monkeypatch.setattr(report, "curves", lambda given, path: panels.extend(given))
    for step in (0, 2, 4):
        folder.log(step=step, **{"val_0.3": step / 10, "val_0.7": 1 - step / 10, "val_t": 0.5})
    report.rpo_curves(folder, 0.7, "harmonic", 2)
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
        train(tmp_path / "x", "--references", str(folder), "--class-name", "mug", "--prompts", str(prompts))
    assert not (tmp_path / "x").exists()
    argv = ["--run", str(run[0]), "--prompt", long]
    stops_with(lambda: sample.main(argv), "--prompt: the text encoder reads 22 words; shorten it", capsys)
    argv = ["--guidance", "-0.5", "--out", str(tmp_path / "x.png")]
    stops_with(lambda: sample.main(argv), "--guidance -0.5: 0 or more, or -1 for the run's own", capsys)


def test_learning_makes_the_pictures_more_like_the_subject(tmp_path):
    summary = train(tmp_path / "x", steps=40, val_every=40, batch=4, mode="similarity", sample_steps=6)
    assert summary["clip_i"]["last"] > summary["clip_i"]["base"] + 0.1


def test_labels_drawn_or_not_leave_every_other_draw_alone(tmp_path):
    """With beta 0 the labels weigh nothing: the weights are those of similarity alone, bit for bit."""
    train(tmp_path / "drawn", "--no-soft-labels", beta=0)
    train(tmp_path / "alone", mode="similarity")
    assert same(weights(tmp_path / "drawn"), weights(tmp_path / "alone"))


def test_dreambooths_prior_never_names_the_subject(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(train_rpo, "text_prompts", lambda texts: said.append(texts) or text_prompts(texts))
    train(tmp_path / "x", mode="dreambooth")
    assert set(said[0]) == {"a photo of a circle"} and said[0] == said[1]  # drawn from, and trained under
    assert all("[V]" in t for t in said[2] + said[3])  # the instance prompt, the validation prompts


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


def test_the_base_the_text_encoder_and_the_codec_never_change(tmp_path, monkeypatch):
    loaded = []
    load = train_rpo.Pipeline.load
    monkeypatch.setattr(train_rpo.Pipeline, "load", staticmethod(lambda *a: loaded.append(load(*a)) or loaded[0]))
    train(tmp_path / "x")
    pipe, fresh = loaded[0], load(None)
    assert same(pipe.unet.state_dict(), fresh.unet.state_dict()) and same(
        pipe.clip.state_dict(), fresh.clip.state_dict()
    )
    parameters = [*pipe.unet.parameters(), *pipe.clip.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in parameters)


def test_it_stops_when_no_lambda_has_improved_for_a_while(tmp_path):
    """With learning rate 0 nothing ever improves."""
    summary = train(tmp_path / "x", lr=0, steps=20, patience=2)
    assert summary["last_step"] == 4 and summary["best_step"] == 0


def test_it_goes_on_while_the_reward_of_any_lambda_improves(tmp_path, monkeypatch):
    """Only that of 0.7 does, up to step 8; two validations later the run ends."""
    calls = Counter()

    def rising(I, T, lam):
        calls[lam] += 1
        return torch.full_like(I, min(calls[lam], 5) if lam == 0.7 else 0.5)

    monkeypatch.setattr(train_rpo, "harmonic", rising)
    summary = train(tmp_path / "x", mode="similarity", steps=20, patience=2, lam_val=0.3)
    assert summary["last_step"] == 12 and summary["best_step"] == 0 and summary["steps"]["best 0.7"] == 8


def test_sample_places_the_subject_by_a_prompt(run, tmp_path, capsys):
    argv = ["--run", str(run[0]), "--count", "2", "--out", str(tmp_path / "x.png")]
    sample.main([*argv, "--prompt", "a [V] circle on a red background"])
    assert Image.open(tmp_path / "x.png").size[0] > 150 and (tmp_path / "x" / "aligned_01.png").is_file()
    for more, said in ((["--prompt", "a circle"], "name the subject by [V]"), ([], "say --prompt")):
        with pytest.raises(SystemExit) as stop:
            run_main("minipref", partial(sample.main, [*argv, *more]))
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_sample_draws_with_the_kept_weights_as_the_run_did(run, tmp_path):
    """best.pt, not last.pt; guidance 3, eta 0 and 2 steps are the run's own."""
    folder, prompt = tmp_path / "run", "a [V] circle on a red background"
    shutil.copytree(run[0], folder)
    train(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / "last.pt", folder / "best.pt")
    sample.main(["--run", str(folder), "--prompt", prompt, "--count", "2", "--out", str(tmp_path / "x.png")])
    pipe, how = Pipeline.load(None), Sampling(2, 0.0, 3.0)
    best, last = (load_unet(folder / f"{name}.pt")[0] for name in ("best", "last"))
    for unet, name, apart in ((best, "aligned", False), (last, "aligned", True), (pipe.unet, "base", False)):
        made = pipe.complete(unet, text_prompts([prompt] * 2), how, seed=0, epoch=0)
        written = torch.stack([read_image(tmp_path / "x" / f"{name}_{i:02d}.png", None) for i in range(2)])
        assert torch.allclose(written, made.clamp(0, 1), atol=0.01) != apart


def test_every_subject_and_seed_has_noise_of_its_own(tmp_path, monkeypatch):
    seeds = []

    def complete(self, unet, prompts, how, *, seed, epoch):
        seeds.append(seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "complete", complete)
    for case in ({"subject": 1}, {"subject": 0}, {"seed": 1}, {"seed": 1, "subject": 1}):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / str(len(seeds)), **case)
    assert len(set(seeds)) == 4


def test_the_grid_names_references_rows_and_prompts(tmp_path, monkeypatch):
    drawn = []
    true = report.grid
    monkeypatch.setattr(report, "grid", lambda rows, **more: drawn.append((rows, more)) or true(rows, **more))
    subject, asked = load_subject("", "", 0)[0], [Placed(f"a [V] circle {i}") for i in range(10)]
    pictures = {k: torch.rand(10, 3, 32, 32) for k in ("base", "best")}
    report.rpo_grid(tmp_path / "x.png", subject, asked, pictures)
    assert [name for name, _ in drawn[0][0]] == ["references"] and drawn[0][1]["title"] == subject.name
    assert drawn[1][1]["columns"] == [p.text for p in asked[:8]]
    assert all(name == k and torch.equal(x, pictures[k][:8]) for (name, x), k in zip(drawn[1][0], pictures))


def pixel_encoder(images):
    """The mean colour of a picture."""
    return images.mean((2, 3))


def broken_encoder(images):
    return images.mean()


def raising_encoder(images):
    raise RuntimeError("mat1 and mat2")


def counting_pixels(images):
    return (images > 0.5).flatten(1).int()


def growing_encoder(images):
    return torch.ones(len(images), len(images))


def test_a_further_judge_of_likeness_has_its_column_and_is_tried_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "my_encoder", sys.modules[__name__])
    grids = []
    monkeypatch.setattr(train_rpo, "rpo_grid", lambda *a: grids.append(a))
    summary = train(tmp_path / "x", image_encoder="my_encoder:pixel_encoder", test_images=1)
    references = load_subject("", "", 0)[0].references
    for name, made in grids.pop()[3].items():
        x, y = (torch.nn.functional.normalize(pixel_encoder(v), dim=1) for v in (made, references))
        assert summary["further_i"][name] == pytest.approx((x @ y.T).mean().item(), abs=1e-5)
    assert summary["further_i"]["base"] != summary["further_i"]["last"]
    printed = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:2] == "| "]
    columns = [k for k in summary if isinstance(summary[k], dict) and k != "steps"]
    assert [line[0] for line in printed[1:]] == list(summary["steps"]) and printed[0][-len(columns) :] == columns
    for name, step, *cells in printed[1:]:
        assert (step, cells) == (str(summary["steps"][name]), [f"{summary[k][name]:.3f}" for k in columns])
    with pytest.raises(ValueError, match=r"my_encoder:broken_encoder: gave \(\), expected \(4, D\)"):
        train(tmp_path / "y", image_encoder="my_encoder:broken_encoder")
    with pytest.raises(ValueError, match="my_encoder:raising_encoder: raised RuntimeError: mat1 and mat2"):
        train(tmp_path / "y", image_encoder="my_encoder:raising_encoder")
    assert ImageJudge("my_encoder:counting_pixels", torch.eye(3)[:, None])(torch.ones(2, 1, 3)) == pytest.approx(
        3**-0.5
    )
    judge = ImageJudge("my_encoder:growing_encoder", torch.zeros(4, 3, 32, 32))
    with pytest.raises(ValueError, match=r"gave \(3, 3\), expected \(3, 4\)"):
        judge(torch.zeros(3, 3, 32, 32))
    assert not (tmp_path / "y").exists()
