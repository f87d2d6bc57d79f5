"""From ratings to a reward model that knows its error, small enough to run in seconds."""

import json
import math
import sys
from dataclasses import asdict

import pytest
import torch
from helpers import stops_with
from PIL import Image

import train_reward
from minipref.data import rating_files
from minipref.data import ratings as R
from minipref.data.prompts import prompt_seed
from minipref.pipeline import SHIPPED, Pipeline, Sampling, load_unet
from minipref.reward_model import LearnedReward, judge_reward
from minipref.rewards import load_reward
from minipref.runtime import checkpoint
from minipref.runtime.config import parse
from minipref.runtime.runlog import RunFolder
from minipref.toy.raters import gold
from minipref.toy.world import scene_prompts, shown_scene

TINY = {"--prompts": 24, "--samples": 2, "--sampling-steps": 2, "--epochs": 2, "--dim": 8, "--threads": 1}


def train(out, monkeypatch, *more, **changes):
    """Runs train_reward.py in this process; -> its summary."""
    flags = TINY | {"--" + k.replace("_", "-"): v for k, v in changes.items()}
    argv = ["train_reward.py", "--small", "--out", str(out), *more] + [str(x) for pair in flags.items() for x in pair]
    monkeypatch.setattr(sys, "argv", argv)
    train_reward.main()
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("reward") / "a"
    summary = train(folder, patch)
    patch.undo()
    return folder, summary


def read(folder):
    """The toy ratings of a folder, or of several."""
    return rating_files.load(folder, 32, truth=shown_scene)[0]


def truth(rated):
    return gold(rated.images, rated.prompts.masks, rated.prompts.truth).label


def config(**changes):
    """`--small`, with changes."""
    return train_reward.RewardConfig(**{**train_reward.PRESETS["small"], **changes})


def test_the_defaults_are_prefpaints_and_small_is_the_toys():
    """The paper's values and its released code's clamp; `--small` trains what it trained before it was a table."""
    paper = asdict(train_reward.RewardConfig())
    told = {"batch_size": 5, "lr": 1e-5, "dim": 256, "freeze": 0.7, "lam": 0.01, "samples": 3}
    told |= {"features": "clip", "objective": "regression", "trust": "paper", "trust_lo": 1, "trust_hi": 2.21}
    assert {k: paper[k] for k in told} == told
    small = asdict(parse(train_reward.RewardConfig, ["--small"], prog="", description="", presets=train_reward.PRESETS))
    fitted = {"features": "conv", "freeze": 0.7, "objective": "regression", "bins": 7, "epochs": 40, "batch_size": 32}
    fitted |= {"lr": 0, "dim": 64, "lam": 0.01, "delta": 0.05, "noise_scale": 0, "psi_norm": 0, "seed": 0}
    fitted |= {"trust": "quantiles", "trust_lo": 0, "trust_hi": 1e9}
    fitted |= {"prompts": 1536, "samples": 3, "sampling_steps": 6, "second_round_prompts": 300}
    assert {k: small[k] for k in fitted} == fitted and small["preset"] == "small"


def test_a_run_leaves_model_ratings_pictures_and_figures(run):
    folder, summary = run
    wanted = "spearman r2 pair_accuracy within_prompt_correlation noise_scale noise_scale_residual bound_coverage"
    wanted += " bound_coverage_single_rating delta bound_median error_median norm_error_spearman seconds seed"
    assert set(wanted.split()) <= set(summary) and summary["judge"] == "gold" and summary["rated"] == 24 * 4
    assert all(isinstance(summary[k], (int, float)) for k in wanted.split())
    for name in ("reward.pt", "config.json", "bound.png", "trust.png", "gold_sheet.png", "ratings/ratings.jsonl"):
        assert (folder / name).stat().st_size > 0
    assert Image.open(folder / "bound.png").size[0] > 900
    assert [json.loads(x)["epoch"] for x in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_its_figures_are_those_of_the_saved_model_on_prompts_that_it_never_saw(run):
    """Computed again from the files alone, on the third split, without the widened pictures."""
    folder, summary = run
    r = read(folder)
    third = r.select(R.split_by_prompt(r.groups, 0)["judge"])
    own = third.select(~third.widened)
    model = load_reward(f"model:{folder}", None).reward
    assert isinstance(model, LearnedReward)
    guess = model(own.images, own.prompts).value
    norms = model.calibration.label_norms
    on_scale = [g * norms[s][1] + norms[s][0] for g, s in zip(guess.tolist(), own.strata)]
    true = truth(own)
    error = torch.tensor(on_scale) - true
    r2 = 1 - float(error.square().sum() / (true - true.mean()).square().sum())
    assert summary["r2"] == pytest.approx(r2, abs=1e-4)
    normalised = error / torch.tensor([norms[s][1] for s in own.strata])
    assert summary["error_median"] == pytest.approx(float(normalised.abs().median()), abs=1e-4)
    bound = model.bound(model.z(own.images, own.prompts), 0.05)
    assert summary["bound_coverage"] == pytest.approx(float((normalised.abs() <= bound).double().mean()))


def test_the_same_seed_gives_the_same_model_and_ratings_on_disk_serve_like_fresh_ones(run, tmp_path, monkeypatch):
    folder, summary = run
    again = train(tmp_path / "b", monkeypatch, ratings=folder)
    for key in set(summary) - {"seconds", "peak_memory_mb"}:
        assert again[key] == summary[key], key
    a, b = (torch.load(f / "reward.pt", weights_only=True)["state"] for f in (folder, tmp_path / "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "pairs"},
        {"objective": "bins"},
        {"features": "clip", "freeze": 1.0, "lr": 5e-4},
        {"features": "clip", "lr": 5e-4},
    ],
    ids=str,
)
def test_every_objective_and_tower_goes_from_ratings_to_a_model(run, tmp_path, monkeypatch, changes):
    summary = train(tmp_path / "x", monkeypatch, ratings=run[0], **changes)
    assert summary["within_prompt_correlation"] != run[1]["within_prompt_correlation"]
    prompts = scene_prompts(1, 0, 4)
    scores = LearnedReward.load(tmp_path / "x" / "reward.pt")(prompts.images, prompts)
    assert torch.isfinite(scores.value).all() and scores.value.std() > 0


def test_ridge_and_V_never_see_the_prompts_that_features_learned_from(run):
    """Other labels on the first split change the features; other labels on the third change nothing at all."""
    r = read(run[0])
    at = R.split_by_prompt(r.groups, 0)
    cfg = config(epochs=1, dim=8)
    pipe = Pipeline.load(None)

    def psi(where):
        raters = r.raters.clone()
        raters[at[where]] = raters[at[where]].flip(0)
        spoilt = R.Ratings(r.prompts, r.images, raters, r.groups, r.sources, r.widened)
        return train_reward.fit({k: spoilt.select(v) for k, v in at.items()}, cfg, pipe)[0].ridge

    plain = train_reward.fit({k: r.select(v) for k, v in at.items()}, cfg, pipe)[0].ridge
    assert torch.equal(psi("judge").psi, plain.psi)
    other = psi("ridge")
    assert torch.equal(other.V_cholesky, plain.V_cholesky) and not torch.equal(other.psi, plain.psi)
    assert not torch.equal(psi("features").V_cholesky, plain.V_cholesky)


def test_the_noise_of_a_mean_label_is_the_raters_over_the_root_of_their_number(run):
    r = read(run[0])
    part = r.select(R.split_by_prompt(r.groups, 0)["ridge"])
    cfg, norms = config(dim=8), {"": (4.0, 2.0)}
    features = train_reward.new_features(cfg, Pipeline.load(None))
    model, noise = train_reward.solve(features, part, norms, cfg)
    within = part.raters.numpy().std(axis=1, ddof=1)
    assert noise["noise_scale_raters"] == pytest.approx(float((within**2).mean() ** 0.5) / 2 / 3**0.5, rel=1e-6)
    c = model.calibration
    assert c.noise_scale == max(noise.values()) and c.psi_norm == pytest.approx(float(model.ridge.psi.norm()))
    single = R.Ratings(part.prompts, part.images, part.raters[:, :1], part.groups, part.sources, part.widened)
    model, noise = train_reward.solve(features, single, norms, cfg)
    assert math.isnan(noise["noise_scale_raters"])  # nobody rated twice: the residuals must serve
    assert model.calibration.noise_scale == noise["noise_scale_residual"] > 0
    told = config(dim=8, noise_scale=0.7, psi_norm=3.0)
    c = train_reward.solve(features, part, norms, told)[0].calibration
    assert (c.noise_scale, c.psi_norm) == (0.7, 3.0)


def test_the_papers_trust_constants_and_clamp_by_flag(run, tmp_path, monkeypatch):
    flags = {"ratings": run[0], "trust": "paper", "trust_lo": 1.0, "trust_hi": 2.21, "epochs": 1}
    train(tmp_path / "x", monkeypatch, **flags)
    c = LearnedReward.load(tmp_path / "x" / "reward.pt").calibration
    assert (c.k, c.b, c.lo, c.hi, c.norm_kind) == (0.05, 0.7, 1.0, 2.21, "paper")


@pytest.mark.slow
def test_a_table_compares_features_and_objectives(run, tmp_path, monkeypatch, capsys):
    train(tmp_path / "x", monkeypatch, "--compare", ratings=run[0], epochs=1)
    text = (tmp_path / "x" / "comparison.md").read_text()
    assert text in capsys.readouterr().out
    table = [line.split(" | ") for line in text.splitlines()]
    assert len(table) == 2 + len(train_reward.RIVALS) and all(len(row) == 6 for row in table if "---" not in row[0])
    assert len({tuple(row[1:5]) for row in table[2:]}) == len(train_reward.RIVALS)  # no two are the same model


def aligned_run(folder):
    """A run of train_rl.py whose policy differs a little from the base."""
    pipe = Pipeline.load(None)
    config = {"weights": "", "data": "", "reward": "model", "seed": 0, "held_out": 0, "eval_prompts": 8}
    made = RunFolder(str(folder), "", config | {"sampling_steps": 3, "eta": 0.5}, "train_rl.py")
    unet, schedule, _ = load_unet(SHIPPED / "unet.pt")
    with torch.no_grad():
        unet.conv_out.bias += 0.05
    meta = {"schedule": vars(schedule.config), "base": pipe.fingerprint, "epoch": 1}
    checkpoint.save(made.path / "last.pt", "unet", unet.config, unet.state_dict(), meta=meta)
    return made.path


def test_a_second_round_rates_a_policy_and_shows_the_error_on_it_before_and_after(run, tmp_path, monkeypatch):
    policy = aligned_run(tmp_path / "rl")
    flags = {"ratings": run[0], "second_round": policy, "second_round_prompts": 20, "policies": policy}
    summary = train(tmp_path / "x", monkeypatch, **flags)
    new, both = read(tmp_path / "x" / "ratings-second"), read(f"{run[0]},{tmp_path / 'x'}")
    third = R.split_for_fit(both, 0, 8)["judge"]
    third = third.select(torch.tensor([s not in set(both.prompts.truth[:96]) for s in third.prompts.truth]))
    assert 0 < len(third) < 40 and summary["rated"] == 96 + 40
    model = load_reward(f"model:{tmp_path / 'x'}", None).reward
    norms = model.calibration.label_norms
    guess = R.denormalise(model(third.images, third.prompts).value, third.strata, norms)
    after = summary["policy_mean_error_on_scale_after"]  # from 1 to 7, so that before and after are comparable
    assert after == pytest.approx(float((guess - truth(third)).abs().mean()), abs=1e-4)
    before = load_reward(f"model:{run[0]}", None).reward
    guess = R.denormalise(before(third.images, third.prompts).value, third.strata, before.calibration.label_norms)
    expected = pytest.approx(float((guess - truth(third)).abs().mean()), abs=1e-4)
    assert summary["policy_mean_error_on_scale_before"] == expected and expected != after
    every = scene_prompts(prompt_seed("rating", 0), 500_000, 20).repeat_each(2)
    aligned = load_unet(policy / "last.pt")[0]  # what is rated are its pictures, sampled as in its run
    theirs = Pipeline.load(None).complete(aligned, every, Sampling(3, 0.5), seed=0, stream=0, first=1_000_000)
    assert (new.images - theirs).abs().max() < 0.5 / 255 + 1e-6
    pipe, prompts = Pipeline.load(None), scene_prompts(prompt_seed("held out", 0), 0, 128)
    drawn = [
        pipe.complete(u, prompts, Sampling(2), seed=0, stream="policies")
        for u in (pipe.unet, load_unet(policy / "last.pt")[0])
    ]
    scores = [model(x, prompts) for x in drawn]
    strata = [f"toy/{k}" for k in prompts.kinds]
    errors = [
        (R.denormalise(s.value, strata, norms) - gold(x, prompts.masks, prompts.truth).label)
        / torch.tensor([norms.get(k, norms[""])[1] for k in strata])
        for s, x in zip(scores, drawn)
    ]
    ranks = [
        torch.cat(v).argsort().argsort().double()
        for v in ([s.parts["norm"] for s in scores], [e.abs() for e in errors])
    ]
    across = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    assert summary["norm_error_spearman_of_policies"] == pytest.approx(across, abs=2e-3)  # ties aside
    third_round = train(tmp_path / "y", monkeypatch, ratings=f"{run[0]},{tmp_path / 'x'}", epochs=1)
    assert third_round["rated"] == 96 + 40  # rounds add up
    assert len(new) == 40 and not new.widened.any()
    old = read(run[0])
    assert not set(new.prompts.truth) & set(old.prompts.truth)
    taken = {row.scene[1] for row in rating_files.scan(tmp_path / "x" / "ratings-second")[0]}
    assert min(taken) == train_reward.next_number(run[0]) == 500_000
    assert train_reward.next_number(f"{run[0]},{tmp_path / 'x'}") == 500_020  # no prompt is rated in two rounds


def test_simulated_raters_add_nothing_to_ratings_of_your_own(run, tmp_path, monkeypatch):
    """They know toy scenes only: ratings whose true scene is unknown, or a policy of pictures, are refused."""
    policy, own = aligned_run(tmp_path / "rl"), tmp_path / "own"
    own.mkdir()
    for part in ("images", "masked", "masks"):
        (own / part).symlink_to(run[0] / "ratings" / part)
    rows = [json.loads(line) for line in (run[0] / "ratings" / "ratings.jsonl").read_text().splitlines()]
    (own / "ratings.jsonl").write_text(
        "\n".join(json.dumps({k: v for k, v in r.items() if k != "scene"}) for r in rows)
    )
    with pytest.raises(ValueError, match="simulated raters can add to ratings of toy scenes only"):
        train(tmp_path / "x", monkeypatch, ratings=own, second_round=policy)
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"data": str(tmp_path)}))
    (tmp_path / "p.png").write_bytes((run[0] / "trust.png").read_bytes())
    with pytest.raises(ValueError, match="was aligned on pictures"):
        train(tmp_path / "x", monkeypatch, ratings=run[0], second_round=policy)
    assert not (tmp_path / "x").exists()


def test_too_few_ratings_are_refused_before_anything_is_trained_or_written(run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="second split holds 24 ratings for --dim 24: rate more or lower --dim"):
        train(tmp_path / "x", monkeypatch, ratings=run[0], dim=24)
    assert not (tmp_path / "x").exists()


def test_a_model_of_another_size_is_refused_toy_prompts_before_anything_is_written(tmp_path, monkeypatch, capsys):
    """The same weights, said to be of 64 pixels: they would have to complete pictures of 32."""
    weights, out = tmp_path / "weights", tmp_path / "x"
    weights.mkdir()
    (weights / "clip.pt").symlink_to(SHIPPED / "clip.pt")
    unet = torch.load(SHIPPED / "unet.pt", weights_only=True)
    torch.save(unet | {"config": unet["config"] | {"sample_size": 32}}, weights / "unet.pt")
    line = "the toy world has pictures of 32 pixels and this model has 64"
    stops_with(lambda: train(out, monkeypatch, weights=weights), line, capsys)
    assert not out.exists()


def rated_fills(count):
    """Prompts filled in four ways from perfect to spoilt a little, rated by gold with a rater's noise."""
    generator = torch.Generator().manual_seed(0)
    prompts = scene_prompts(11, 0, count).repeat_each(4)
    spoilt = 0.25 * torch.rand(len(prompts), 1, 1, 1, generator=generator)
    noise = torch.randn(prompts.images.shape, generator=generator)
    images = prompts.paste_known((prompts.images + spoilt * noise).clamp(0, 1))
    labels = gold(images, prompts.masks, prompts.truth).label.double()
    raters = labels[:, None] + 0.2 * torch.randn(len(labels), 2, generator=generator, dtype=torch.float64)
    groups = torch.arange(count).repeat_interleave(4)
    none = torch.zeros(len(images), dtype=torch.bool)
    return R.Ratings(prompts, images, raters, groups, ["toy"] * len(images), none)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["regression", "pairs", "bins"])
def test_every_objective_teaches_the_features_what_raters_see(objective):
    """On prompts never trained on, trained features leave at most 0.8 of what the same untrained ones leave unexplained
    of the variance within a prompt, which is all that pairs can teach and that RL uses."""
    split = R.split_for_fit(rated_fills(250), 0, 8)
    pipe, explained = Pipeline.load(None), []
    for lr, epochs in ((1e-9, 1), (3e-3, 12)):
        model, _ = train_reward.fit(split, config(objective=objective, dim=8, epochs=epochs, lr=lr), pipe)
        figures = judge_reward(model, split["judge"], truth(split["judge"]), 0.05).figures
        explained.append(figures["within_prompt_correlation"] ** 2)
    untrained, trained = (1 - e for e in explained)
    assert trained < 0.8 * untrained


def test_rated_are_the_policys_own_completions_of_the_rating_prompts(tmp_path):
    pipe = Pipeline.load(None)
    train_reward.rate(tmp_path / "a", pipe, pipe.unet, Sampling(2), config(seed=3), start=5, count=2)
    r = read(tmp_path / "a")
    assert len(r) == 2 * (3 + 2) and r.raters.shape == (10, 3) and r.widened.sum() == 4
    known = (r.prompts.masks < 0.5).expand_as(r.images)
    assert torch.equal(r.images[known], r.prompts.masked[known])
    assert (r.labels - truth(r)).abs().mean() < 0.6  # raters stray, not wildly
    prompts = scene_prompts(3 * 1_000_003 + 3, 5, 2).repeat_each(3)
    whole = pipe.complete(pipe.unet, prompts, Sampling(2), seed=3, stream=0, first=15)
    assert r.prompts.truth[:6] == prompts.truth
    assert (r.images[~r.widened] - whole).abs().max() < 0.5 / 255 + 1e-6
