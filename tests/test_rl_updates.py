"""The epochs of train_rl.py, written a second time from PrefPaint's equations: every number that a run leaves."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from helpers import train_tiny as train
from PIL import Image

from minipref.data.prompts import outpainting_masks
from minipref.pipeline import SHIPPED, Pipeline, load_unet
from minipref.reward_model import LearnedReward
from minipref.toy import raters, world

P, S, T, K, N = 3, 2, 4, 2, 3 * 32 * 32  # prompts, samples, steps, trained steps, dimensions
RL_WORLD, HELD_OUT_WORLD = 4 * 1_000_003, 5 * 1_000_003  # of prompts: no number of the one is one of the other


def noise(seed, stream, index):
    """The noise of sample `index`: the start, then that of each step. (T + 1, 12, 16, 16)."""
    bits = np.random.SeedSequence((seed, stream % 2**32, index)).generate_state(1, np.uint64)[0]
    return torch.randn(T + 1, 12, 16, 16, generator=torch.Generator().manual_seed(int(bits >> 1)))


class ByHand:
    """One run: its prompts, its pictures and its updates, without any of the script's own functions."""

    def __init__(self, flags, pictures=None):
        self.flags, self.pictures = flags, pictures
        self.pipe, self.seed, self.eta = Pipeline.load(None), flags.get("seed", 0), flags.get("eta", 1.0)
        self.judge = LearnedReward.load(SHIPPED / "reward.pt")
        abar = self.pipe.schedule.abar.tolist()
        self.times = [999 - 250 * i for i in range(T)]
        self.abar = [abar[t] for t in self.times] + [1.0]
        self.base, self.policy = self.pipe.unet, copy.deepcopy(self.pipe.unet).requires_grad_(True)
        self.average, decay = copy.deepcopy(self.policy), flags.get("weight_decay", 0.01)
        self.optimiser = torch.optim.AdamW(self.policy.parameters(), lr=flags["lr"], weight_decay=decay)
        self.order = np.random.default_rng([self.seed, 1])

    def prompts(self, kind, start, count):
        """Pictures and masks number start … of the toy world, or of the ten own pictures: every fifth is held out."""
        own = {"training": RL_WORLD + self.seed, "held out": HELD_OUT_WORLD + self.flags.get("held_out", 0)}[kind]
        if self.pictures is None:
            p = world.scene_prompts(own, start, count)
            return p.images, p.masks, p.truth
        kept = [i for i in range(10) if (i % 5 == 4) == (kind == "held out")]
        images = self.pictures[[kept[i % len(kept)] for i in range(start, start + count)]]
        return images, outpainting_masks(own, start, count, 32)[0], None

    def mean(self, unet, x, i, images, masks):
        """Mean of the step from time i (B,) of the schedule, and its sigma: from x0 and eps (PrefPaint Eq. 2)."""
        masked = torch.where(masks > 0.5, 0.5, images)
        unshuffle = torch.nn.functional.pixel_unshuffle
        seen = torch.cat([x, unshuffle(masks, 2), unshuffle(2 * masked - 1, 2)], 1)
        empty = self.pipe.clip.context(self.pipe.tokenizer([""] * len(x)))
        v = unet(seen, torch.tensor([self.times[k] for k in i.tolist()]), empty)
        a, p = (torch.tensor([self.abar[k + d] for k in i.tolist()])[:, None, None, None] for d in (0, 1))
        x_0, eps = a.sqrt() * x - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * x
        variance = self.eta**2 * (1 - p) / (1 - a) * (1 - a / p)
        return p.sqrt() * x_0 + (1 - p - variance).clamp(min=0).sqrt() * eps, variance.sqrt()

    def log_prob(self, unet, path, sample, i, images, masks):
        """Mean over dimensions of the log-density of the steps taken, and their Gaussians."""
        mean, sigma = self.mean(unet, path[sample, i], i, images[sample], masks[sample])
        density = -((path[sample, i + 1] - mean) ** 2) / (2 * sigma**2) - sigma.log() - math.log(2 * math.pi) / 2
        return density.mean((1, 2, 3)), mean, sigma

    @torch.no_grad()
    def draw(self, unet, images, masks, stream):
        """Paths (B, T + 1, …), and the completions with the known pixels in place."""
        drawn = torch.stack([noise(self.seed, stream, i) for i in range(len(images))])
        path = [drawn[:, 0]]
        for i in range(T):
            mean, sigma = self.mean(unet, path[-1], torch.full((len(images),), i), images, masks)
            path.append(mean + sigma * drawn[:, i + 1])
        shown = (torch.nn.functional.pixel_shuffle(path[-1], 2) / 2 + 0.5).clamp(0, 1)
        return torch.stack(path, 1), torch.where(masks > 0.5, shown, images)

    def score(self, completions, images, masks):
        """The reward's value and, of the learned one, gamma and bound."""
        if self.pictures is not None:
            return 5 * completions.mean((1, 2, 3)), torch.ones(len(images)), torch.zeros(len(images))
        z = self.judge.features(completions, torch.where(masks > 0.5, 0.5, images), masks).double()
        V, c = self.judge.ridge.V_cholesky @ self.judge.ridge.V_cholesky.T, self.judge.calibration
        norm = (z @ torch.linalg.inv(V) * z).sum(1).sqrt()
        factor = (
            c.noise_scale
            * math.sqrt(torch.logdet(V).item() - len(V) * math.log(self.judge.ridge.lam) - 2 * math.log(0.05))
            + math.sqrt(self.judge.ridge.lam) * c.psi_norm
        )
        value, gamma = z @ self.judge.ridge.psi, torch.exp(-c.k * norm + c.b).clamp(c.lo, c.hi)
        return value.float().detach(), gamma.float().detach(), (factor * norm).float().detach()

    def gold(self, completions, masks, truth):
        return None if truth is None else raters.gold(completions, masks, truth).label.mean().item()

    def epoch(self, number):
        """Rolls out, scores, updates. -> what the log should say."""
        flags = self.flags
        images, masks, _ = self.prompts("training", (number - 1) * P, P)
        images, masks = (torch.stack([x[i // S] for i in range(P * S)]) for x in (images, masks))
        self.path, completions = self.draw(self.policy, images, masks, number)
        self.shown = images, masks
        value, gamma, _ = self.score(completions, images, masks)
        centred = value - value.reshape(P, S).mean(1).repeat_interleave(S)
        advantage = centred / (centred.square().mean().sqrt() + 1e-7)
        kind = flags.get("trust", "exponential")
        weight = {"off": torch.ones(P * S), "constant": gamma.mean().expand(P * S), "exponential": gamma}[kind]
        scored, kls, losses, self.joint = T - 1, [], [], []  # the last step is not random
        with torch.no_grad():
            every = [(s, i) for s in range(P * S) for i in range(scored)]
            sample, step = (torch.tensor(v) for v in zip(*every))
            old = self.log_prob(self.policy, self.path, sample, step, images, masks)[0].reshape(P * S, scored)
        updates = flags.get("updates_per_epoch", 2)
        for part in np.array_split(self.order.permutation(P * S), updates):
            chosen = [self.order.permutation(scored)[:K] for _ in part]
            sample = torch.tensor([s for s in part for _ in range(K)])
            step = torch.tensor([i for own in chosen for i in own])
            new, mean, sigma = self.log_prob(self.policy, self.path, sample, step, images, masks)
            ratio, width = (new - old[sample, step]).exp(), flags.get("clip_range", 1.64) / N
            self.joint += (N * (new - old[sample, step])).tolist()  # log-ratios, summed over the dimensions
            worse = torch.maximum(-advantage[sample] * ratio, -advantage[sample] * ratio.clamp(1 - width, 1 + width))
            loss = (weight[sample] * worse).mean()
            if flags["kl_weight"]:
                with torch.no_grad():
                    mean_base, _ = self.mean(self.base, self.path[sample, step], step, images[sample], masks[sample])
                kl = ((mean - mean_base) ** 2 / (2 * sigma**2)).sum((1, 2, 3))
                loss = loss + flags["kl_weight"] * kl.mean() / N
                kls.append(scored * kl.mean().item())
            self.optimiser.zero_grad()
            loss.backward()
            if flags.get("grad_clip", 1.0):
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), flags.get("grad_clip", 1.0))
            self.optimiser.step()
            losses.append(loss.item())
            with torch.no_grad():
                for a, p in zip(self.average.parameters(), self.policy.parameters()):
                    a.copy_(flags["ema"] * a + (1 - flags["ema"]) * p)
        row = {"reward": value.mean().item(), "loss": sum(losses) / updates}
        row["within_prompt_std"] = centred.square().mean().sqrt().item()
        pairs = (completions[0::2] - completions[1::2]).abs().mean(1, keepdim=True)
        row["diversity"] = ((pairs * masks[::2]).sum((1, 2, 3)) / masks[::2].sum((1, 2, 3))).mean().item()
        return row | ({"kl": sum(kls) / updates} if kls else {})

    @torch.no_grad()
    def kl(self, unet, path, images, masks):
        """KL(unet ‖ base) of whole paths in nats, (B,)."""
        total = torch.zeros(len(path))
        for i in range(T - 1):
            step = torch.full((len(path),), i)
            (mean, sigma), (mean_base, _) = (self.mean(u, path[:, i], step, images, masks) for u in (unet, self.base))
            total += ((mean - mean_base) ** 2 / (2 * sigma**2)).sum((1, 2, 3))
        return total

    def evaluate(self):
        images, masks, truth = self.prompts("held out", 0, 8)
        completions = self.draw(self.average, images, masks, -1)[1]
        value, _, bound = self.score(completions, images, masks)
        self.lower = (value.mean() - bound.mean()).item()
        row = {"eval_reward": value.mean().item(), "eval_gold": self.gold(completions, masks, truth)}
        return {k: v for k, v in row.items() if v is not None}

    def summary(self):
        images, masks, truth = self.prompts("held out", 8, 8)
        drawn = [self.draw(u, images, masks, stream)[1] for u, stream in ((self.base, -2), (self.average, -3))]
        before, after = (self.score(x, images, masks)[0] for x in drawn)
        found = {"reward_before": before.mean().item(), "reward_after": after.mean().item()}
        found["win_rate_reward"] = (after > before).double().mean().item()
        judged = before, after
        if truth is not None:
            judged = [raters.gold(x, masks, truth).label for x in drawn]
            found |= {"gold_before": judged[0].mean().item(), "gold_after": judged[1].mean().item()}
        share = ((judged[1] > judged[0]).double() + 0.5 * (judged[1] == judged[0]).double()).mean().item()
        z, half = 1.959964, 0.5  # Wilson 1927, solved for the two ends: (share − p)² = z² p (1 − p) / 8
        root = math.sqrt((2 * 8 * share + z * z) ** 2 - 4 * (8 + z * z) * 8 * share * share)
        ends = [half * (2 * 8 * share + z * z + sign * root) / (8 + z * z) for sign in (-1, 1)]
        path, _ = self.draw(self.average, images, masks, -4)
        kl = self.kl(self.average, path, images, masks).mean().item()
        return found | {"win_rate": share, "win_rate_ci": ends, "kl": kl}


RUNS = {
    "learned reward": {"kl_weight": 5.0, "ema": 0.5, "lr": 1e-4, "weight_decay": 5.0, "micro_batch": 5, "epochs": 2,
        "eval_every": 3,
    },
    "one weight for all, no KL": {
        "trust": "constant", "kl_weight": 0, "ema": 0.2, "lr": 1e-4, "clip_range": 0.02, "seed": 2, "held_out": 7,
        "epochs": 3, "eval_every": 2,
    },
    "own pictures": {
        "trust": "off", "kl_weight": 0.5, "ema": 0.3, "lr": 3e-4, "eta": 0.6, "seed": 3, "held_out": 1,
        "updates_per_epoch": 1, "grad_clip": 0, "epochs": 2, "eval_every": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_the_epochs_are_those_of_the_papers_equations(name, tmp_path, monkeypatch):
    """Rewards, losses, KL, evaluations, the final comparison and all weights agree with a second writing."""
    flags, pictures, more = RUNS[name], None, {}
    if name == "own pictures":
        drawn = torch.randint(256, (10, 4, 4, 3), generator=torch.Generator().manual_seed(4)).byte()
        drawn = drawn.repeat_interleave(8, 1).repeat_interleave(8, 2)
        (tmp_path / "photos").mkdir()
        for i, x in enumerate(drawn):
            Image.fromarray(x.numpy()).save(tmp_path / "photos" / f"{i}.png")
        (tmp_path / "bright.py").write_text("def five(images, prompts):\n    return 5 * images.mean((1, 2, 3))\n")
        monkeypatch.chdir(tmp_path)
        pictures, more = drawn.permute(0, 3, 1, 2) / 255, {"data": "photos", "reward": "bright:five"}
    size = {"prompts": P, "samples": S, "sampling_steps": T, "train_steps": K}
    summary = train(tmp_path / "run", monkeypatch, **(size | flags | more | {"guard": 0}))
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    second = ByHand(flags, pictures)
    best, found = -math.inf, {}
    for epoch in range(flags["epochs"] + 1):
        expected = second.epoch(epoch) if epoch else {}
        if epoch % flags["eval_every"] == 0 or epoch == flags["epochs"]:
            if epoch and not flags["kl_weight"]:  # of the policy, on one sample a prompt of this epoch's rollout
                images, masks = (x[::S] for x in second.shown)
                expected["kl"] = second.kl(second.policy, second.path[::S], images, masks).mean().item()
            expected |= second.evaluate()
            if second.lower > best:
                best, found["best"] = second.lower, copy.deepcopy(second.average.state_dict())
        if epoch:
            ends = [rows[epoch][f"log_ratio_{k}"] for k in ("min", "max")]
            assert ends == pytest.approx([min(second.joint), max(second.joint)], rel=0.01, abs=0.02)
        assert {k: rows[epoch][k] for k in expected} == pytest.approx(expected, rel=2e-3, abs=1e-4), epoch
        assert ("eval_reward" in rows[epoch], "kl" in rows[epoch]) == ("eval_reward" in expected, "kl" in expected)
    expected = second.summary()
    ends, (lo, hi) = expected.pop("win_rate_ci"), summary["win_rate_ci"]
    for k, v in expected.items():  # a reward's scale is 1, and its mean may be near 0
        assert summary[k] == pytest.approx(v, rel=2e-3, abs=1e-3 if k.startswith("reward_") else 1e-4), k
    assert [lo, hi] == pytest.approx(ends, abs=1e-6) and summary["judge"] == ("gold" if pictures is None else "reward")
    found["last"], start = second.average.state_dict(), second.base.state_dict()
    for file, state in found.items():
        kept = load_unet(tmp_path / "run" / f"{file}.pt")[0].state_dict()
        moved, wanted = (torch.cat([(s[k] - start[k]).flatten() for k in start]) for s in (kept, state))
        apart = (moved - wanted).norm() / wanted.norm().clamp(min=1e-12)
        assert apart < 0.01, (file, apart)
