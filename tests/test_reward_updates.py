"""train_reward.py written a second time: features, last layer, bound and figures, from the ratings alone."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import train_reward
from minipref.data import rating_files
from minipref.models.reward_features import RewardFeatures
from minipref.presets import SMALL_FEATURES
from minipref.reward_model import LearnedReward
from minipref.toy import raters, world

DIM, BATCH, EPOCHS = 6, 16, 2


def train(out, monkeypatch, **flags):
    flags = {"dim": DIM, "batch-size": BATCH, "epochs": EPOCHS, "threads": 1} | flags
    argv = ["train_reward.py", "--small", "--out", str(out), *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]
    monkeypatch.setattr(sys, "argv", argv)
    train_reward.main()
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """Ratings of 30 prompts, by raters who count in tens: 10 to 70."""
    folder = tmp_path_factory.mktemp("rated")
    with pytest.MonkeyPatch.context() as patch:
        flags = {"prompts": 30, "samples": 2, "sampling-steps": 2, "epochs": 1}
        train(folder / "run", patch, **flags)
    ratings = folder / "run" / "ratings"
    lines = [json.loads(line) for line in (ratings / "ratings.jsonl").read_text().splitlines()]
    for row in lines:
        row["scores"] = [{k: 10 * v for k, v in each.items()} for each in row["scores"]]
    (ratings / "ratings.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return ratings


class ByHand:
    def __init__(self, folder, objective, seed, bins):
        self.r, self.objective, self.seed = (
            rating_files.load(folder, 32, 10, 70, truth=world.shown_scene)[0],
            objective,
            seed,
        )
        self.bins, r = bins, self.r
        order = torch.randperm(30, generator=torch.Generator().manual_seed(seed)).tolist()  # 60, 25 and 15 %
        self.prompts = {"features": order[:18], "ridge": order[18:26], "judge": order[26:]}
        self.label = r.raters.double().mean(1).numpy()
        first = self.of("features")
        strata = [r.strata[i] for i in first]
        self.norms = {"": (self.label[first].mean(), self.label[first].std(ddof=1))}
        for s in set(strata):
            own = self.label[[i for i, k in zip(first, strata) if k == s]]
            assert len(own) >= 20  # each has a scale of its own
            self.norms[s] = own.mean(), own.std(ddof=1)

    def of(self, split):
        return [i for i, g in enumerate(self.r.groups.tolist()) if g in self.prompts[split]]

    def normalised(self, labels, at):
        return np.array([(labels[i] - self.norms[self.r.strata[i]][0]) / self.norms[self.r.strata[i]][1] for i in at])

    def features(self):
        """Learns from the first split; of the last layer nothing is kept."""
        at, r = self.of("features"), self.r
        y = torch.tensor(self.normalised(self.label, at)).float()
        seen = [x[at] for x in (r.images, torch.where(r.prompts.masks > 0.5, 0.5, r.images), r.prompts.masks)]
        torch.manual_seed(self.seed)
        features = RewardFeatures(replace(SMALL_FEATURES, dim=DIM))
        torch.manual_seed(self.seed)
        last = nn.Linear(DIM, self.bins if self.objective == "bins" else 1, bias=self.objective == "bins")
        optimiser = torch.optim.AdamW([*features.parameters(), *last.parameters()], weight_decay=0.01)
        edges = np.quantile(y.numpy(), [i / self.bins for i in range(1, self.bins)])
        groups, total, losses = r.groups[at], EPOCHS * math.ceil(len(at) / BATCH), []
        for epoch in range(EPOCHS):
            order = torch.randperm(len(at)).tolist()
            if self.objective == "pairs":
                place = torch.randperm(int(groups.max()) + 1).tolist()
                order = sorted(range(len(at)), key=lambda i: place[groups[i]])
            mine = []
            for k in range(0, len(at), BATCH):
                chosen, step = order[k : k + BATCH], epoch * math.ceil(len(at) / BATCH) + k // BATCH
                rate = 1.5e-3 * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / total)) / 2
                optimiser.param_groups[0]["lr"] = rate
                mirrored = (epoch + k // BATCH) % 2 == 1
                x = [v[chosen].flip(3) if mirrored else v[chosen] for v in seen]
                guess, own = last(features(*x)), y[chosen]
                if self.objective == "regression":
                    loss = ((guess[:, 0] - own) ** 2).mean()
                elif self.objective == "bins":
                    kind = torch.tensor([int((edges < v).sum()) for v in own.numpy()])
                    loss = -guess.log_softmax(1)[torch.arange(len(own)), kind].mean()
                else:
                    of = [(i, j) for i in range(len(own)) for j in range(len(own))
                          if groups[chosen[i]] == groups[chosen[j]] and own[i] > own[j]]  # fmt: skip
                    loss = torch.stack([(1 + (guess[j, 0] - guess[i, 0]).exp()).log() for i, j in of]).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                mine.append(loss.item())
            losses.append(sum(mine) / len(mine))
        for x in features.parameters():
            x.data = x.data.half().float()
        return features.eval(), losses

    @torch.no_grad()
    def z(self, features, at):
        return features(self.r.images[at], self.r.prompts.masked[at], self.r.prompts.masks[at]).double().numpy()


CASES = {
    "regression": {"seed": 0},
    "pairs": {"seed": 1, "delta": 0.3, "lam": 0.5, "trust-lo": 0.6, "trust-hi": 1.1},
    "bins": {"seed": 2, "bins": 3},
}


@pytest.mark.parametrize("objective", CASES)
def test_the_reward_model_is_that_of_the_papers_equations(objective, rated, tmp_path, monkeypatch):
    flags = CASES[objective]
    scale = {"ratings": rated, "score-lo": 10, "score-hi": 70}
    summary = train(tmp_path / "x", monkeypatch, objective=objective, **scale, **flags)
    rows = [json.loads(line) for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    model = LearnedReward.load(tmp_path / "x" / "reward.pt")
    second = ByHand(rated, objective, flags["seed"], flags.get("bins", 7))
    r = second.r
    assert summary["rated"] == len(r) == 30 * 4 and summary["left_out"] == 0

    # Features: the same losses, and the same weights but for rounding.
    features, losses = second.features()
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-3)
    own, theirs = (torch.cat([p.detach().flatten() for p in f.parameters()]) for f in (features, model.features))
    torch.manual_seed(flags["seed"])
    start = torch.cat([p.detach().flatten() for p in RewardFeatures(replace(SMALL_FEATURES, dim=DIM)).parameters()])
    assert (own - theirs).norm() < 0.05 * (own - start.half().float()).norm()

    # The last layer and V on the second split, from the normal equations; the bound; gamma from left-out norms.
    at, lam, c = second.of("ridge"), flags.get("lam", 0.01), model.calibration
    Z, y = second.z(model.features, at), second.normalised(second.label, at)
    V = Z.T @ Z + lam * np.eye(DIM)
    psi = np.linalg.inv(V) @ Z.T @ y
    assert np.allclose(model.ridge.psi.numpy(), psi, rtol=1e-5, atol=1e-7)
    assert np.allclose((model.ridge.V_cholesky @ model.ridge.V_cholesky.T).numpy(), V, rtol=1e-6)
    left_out = np.array([math.sqrt(z @ np.linalg.inv(V - np.outer(z, z)) @ z) for z in Z])
    assert c.norm_quantiles == pytest.approx({str(q): np.quantile(left_out, q) for q in (0.05, 0.5, 0.95, 0.99)})
    k = math.log(2) / (np.quantile(left_out, 0.95) - np.median(left_out))
    assert (c.k, c.b, c.norm_kind) == (pytest.approx(k), pytest.approx(k * np.median(left_out)), "theorem")
    assert (c.lo, c.hi, c.delta) == (flags.get("trust-lo", 0), flags.get("trust-hi", 1e9), flags.get("delta", 0.05))
    assert {s: tuple(v) for s, v in c.label_norms.items()} == {
        s: pytest.approx(v, rel=1e-6) for s, v in second.norms.items()
    }
    H = Z @ np.linalg.inv(V) @ Z.T
    rest = np.eye(len(at)) - H
    residual = math.sqrt(((rest @ y) ** 2).sum() / np.trace(rest @ rest))
    spread = np.array([second.norms[r.strata[i]][1] for i in at])
    within = r.raters[at].numpy().var(axis=1, ddof=1).mean()
    repeated = math.sqrt((within / spread**2 / 3).mean())
    assert (summary["noise_scale_raters"], summary["noise_scale_residual"]) == (
        pytest.approx(repeated), pytest.approx(residual, rel=1e-5),
    )  # fmt: skip
    assert c.noise_scale == pytest.approx(max(repeated, residual), rel=1e-5) == summary["noise_scale"]
    assert c.psi_norm == pytest.approx(np.linalg.norm(psi), rel=1e-5)
    size = np.linalg.slogdet(V)[1] - DIM * math.log(lam) - 2 * math.log(c.delta)
    factor = c.noise_scale * math.sqrt(size) + math.sqrt(lam) * c.psi_norm
    assert model.bound_factor(c.delta) == pytest.approx(factor, rel=1e-5)

    # The third split, without what was widened, against gold.
    at = [i for i in second.of("judge") if not r.widened[i]]
    Z, where = second.z(model.features, at), r.prompts.select(at)
    gold, guess = raters.gold(r.images[at], where.masks, where.truth).label.double().numpy(), Z @ psi
    y = second.normalised(dict(zip(at, gold)), at)
    first_rater = second.normalised(dict(zip(at, r.raters[at, 0].numpy())), at)
    bound = factor * np.sqrt((Z @ np.linalg.inv(V) * Z).sum(1))
    on_scale = np.array([g * second.norms[r.strata[i]][1] + second.norms[r.strata[i]][0] for g, i in zip(guess, at)])
    groups = r.groups[at].tolist()
    ordered = [
        (guess[i] > guess[j]) + 0.5 * (guess[i] == guess[j])
        for i in range(len(at)) for j in range(len(at)) if groups[i] == groups[j] and y[i] > y[j]
    ]  # fmt: skip
    mean = {g: [np.mean([v[i] for i in range(len(at)) if groups[i] == g]) for v in (guess, y)] for g in groups}
    apart = [np.array([v[i] - mean[groups[i]][k] for i in range(len(at))]) for k, v in enumerate((guess, y))]
    expected = {
        "r2": 1 - ((on_scale - gold) ** 2).sum() / ((gold - gold.mean()) ** 2).sum(),
        "mean_error_on_scale": abs(on_scale - gold).mean(),
        "pair_accuracy": np.mean(ordered),
        "within_prompt_correlation": np.corrcoef(*apart)[0, 1],
        "bound_coverage": (abs(guess - y) <= bound).mean(),
        "bound_coverage_single_rating": (abs(guess - first_rater) <= bound).mean(),
        "error_median": sorted(abs(guess - y))[(len(at) - 1) // 2],
        "trusted_share": (bound / factor <= c.norm_quantiles["0.99"]).mean(),
    }
    assert {k: summary[k] for k in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
