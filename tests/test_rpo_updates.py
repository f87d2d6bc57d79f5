"""The updates of train_rpo.py, written a second time from RPO's equations."""

import json

import pytest
import torch
from helpers import rpo_weights as weights
from helpers import same
from helpers import train_rpo_tiny as train

import train_rpo
from minipref.data.prompts import text_prompts
from minipref.pipeline import SHIPPED, Pipeline, Sampling, load_unet
from minipref.rewards import SubjectReward
from minipref.toy.subjects import prompt_lists, toy_subject


def by_hand(steps, *, beta, switches, seed=0):
    """The first updates, written out a second time from RPO's equations: policy, rows, mean label of all pairs."""
    pipe = Pipeline.load(None)
    subject = toy_subject(0, 32)
    shown = subject.references
    texts = [p.text for p in prompt_lists(subject, seed, (2, 2, 3))[0] for _ in range(2)]
    lam = float(dict(zip(switches, switches[1:])).get("--lam-train", 0.5))
    if "dreambooth" in switches:
        texts = ["a photo of a circle"] * 4
    instance = ["a photo of a [V] circle"] * 2
    generated = pipe.complete(pipe.unet, text_prompts(texts), Sampling(2, 0.0, 3.0), seed=1000 * seed, stream=-10)
    score = SubjectReward(pipe.clip, pipe.tokenizer, shown)
    x_ref, x_gen = pipe.codec.encode(shown), pipe.codec.encode(generated)
    policy = load_unet(SHIPPED / "unet.pt")[0].to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.01)
    draws, coins = (torch.Generator().manual_seed(1000 * seed + i * 10**9) for i in range(2))
    abar, seen, mixed = pipe.schedule.abar.float(), [], []

    def chance(r, g):
        """Labels: a reference's likeness to the subject is that to the other references, under the same prompt."""
        temperature, alike, said = (0.05 if "--label-temperature" in switches else 1), [], [texts[i] for i in g]
        for i in r:
            others = SubjectReward(pipe.clip, pipe.tokenizer, torch.cat([shown[:i], shown[i + 1 :]]))
            alike.append(others(shown[i : i + 1], said[:1])[0])
        I_gen, T_gen = score(generated[g], said)
        T_ref = score(shown[r], said)[1]
        r_ref, r_gen = (1 / (lam / I + (1 - lam) / T) for I, T in ((torch.cat(alike), T_ref), (I_gen, T_gen)))
        return torch.sigmoid((r_ref - r_gen) / temperature)

    for _ in range(steps):
        r, g = (torch.randint(n, (2,), generator=draws) for n in (len(x_ref), len(x_gen)))
        ref, gen, sim = (
            (torch.randint(1000, (2,), generator=draws), torch.randn(2, *x_ref.shape[1:], generator=draws))
            for _ in range(3)
        )
        gen = ref if "--share-noise" in switches else gen

        def error(unet, x, drawn, said):
            t, noise = drawn
            a = abar[t][:, None, None, None]
            x_t, v = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
            condition = pipe.condition(text_prompts(said))
            return (unet(condition.unet_input(x_t), t, condition.context) - v).square().mean((1, 2, 3))

        said = [texts[i] for i in g]
        mixed.append((len(set(r.tolist())), len(set(g.tolist())), len(set(said))))
        of_ref = instance if "instance" in switches else said
        theta_ref, theta_gen = error(policy, x_ref[r], ref, of_ref), error(policy, x_gen[g], gen, said)
        with torch.no_grad():
            base_ref, base_gen = error(pipe.unet, x_ref[r], ref, of_ref), error(pipe.unet, x_gen[g], gen, said)
        margin, y = (base_ref - theta_ref) - (base_gen - theta_gen), chance(r, g)
        if "--no-soft-labels" in switches:
            y = torch.bernoulli(y, generator=coins)
        pulled = beta * margin
        preference = -(y * torch.log(torch.sigmoid(pulled)) + (1 - y) * torch.log(torch.sigmoid(-pulled))).mean()
        similarity = theta_ref.mean() if "instance" in switches else error(policy, x_ref[r], sim, instance).mean()
        parts = {
            "preference": {"preference": preference},
            "similarity": {"similarity": similarity},
            "dreambooth": {"similarity": similarity, "prior": theta_gen.mean()},
        }.get(switches[1] if switches[:1] == ("--mode",) else "", {"preference": preference, "similarity": similarity})
        loss = sum(parts.values())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        if "preference" in parts:
            parts |= {"margin": margin.mean(), "label": y.mean()}
        seen.append({k: v.item() for k, v in parts.items()} | {"loss": loss.item()})
    assert (
        steps < 3 or "dreambooth" in switches or mixed == [(2, 2, 2), (2, 2, 1), (2, 2, 2)]
    )  # references, pictures, prompts
    R, G = len(shown), len(texts)
    every = chance(torch.arange(R).repeat_interleave(G), torch.arange(G).repeat(R))
    return policy, seen, every.mean().item()


@pytest.mark.parametrize(
    "switches",
    [
        (), ("--no-soft-labels",), ("--label-temperature", "0.05"), ("--share-noise",), ("--lam-train", "0.2"),
        ("--reference-prompt", "instance"), ("--mode", "preference"), ("--mode", "similarity"),
        ("--mode", "dreambooth"),
    ],
)  # fmt: skip
def test_three_updates_are_those_of_the_papers_equations(tmp_path, switches):
    """A large beta, so that the preference counts: losses, margins, labels and weights agree with a second writing."""
    beta = {} if switches[-1:] in (("similarity",), ("dreambooth",)) else {"beta": 50.0}
    summary = train(tmp_path / "x", *switches, updates=3, seed=14, **beta)
    rows = [json.loads(x) for x in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()][1:]
    policy, seen, label = by_hand(3, beta=50.0, switches=switches, seed=14)
    for row, expected in zip(rows, seen, strict=True):
        found = {k: v for k, v in row.items() if k not in ("step", "grad_norm") and not k.startswith("val_")}
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-4)
    start, state = load_unet(SHIPPED / "unet.pt")[0].state_dict(), policy.state_dict()
    trained = weights(tmp_path / "x")
    moved = torch.cat([(trained[k] - start[k]).flatten() for k in start])
    wanted = torch.cat([(state[k] - start[k]).flatten() for k in start])
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.98
    if switches == ("--no-soft-labels",):
        assert {r["label"] for r in rows} <= {0.0, 0.5, 1.0}
    assert ("label_mean" in summary) == bool(beta)
    if beta:
        assert summary["label_mean"] == pytest.approx(label, abs=1e-4)


def test_weight_decay_is_decoupled_from_the_gradient(tmp_path):
    """One AdamW update with weight decay w: the weights are lr·w times the old ones smaller than without."""
    train(tmp_path / "with", "--weight-decay", "20", mode="similarity", updates=1, val_every=1)
    train(tmp_path / "without", "--weight-decay", "0", mode="similarity", updates=1, val_every=1)
    start, a, b = (
        load_unet(SHIPPED / "unet.pt")[0].state_dict(),
        weights(tmp_path / "with"),
        weights(tmp_path / "without"),
    )
    assert all(torch.allclose(b[k] - a[k], 1e-3 * 20 * start[k], atol=1e-6) for k in start)


@pytest.mark.slow
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
