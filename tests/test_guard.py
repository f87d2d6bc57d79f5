"""The over-optimisation guard: believes a reward only where the reward model knows the pictures."""

import json
import math

import pytest
import torch
from helpers import train_tiny as train

from minipref import runs
from minipref.guard import Guard
from minipref.pipeline import load_unet
from minipref.reward_model import Scores


def guard(floor=0.5, reward=1.0, trusted=0.9):
    made = Guard(floor)
    assert made.start(reward, trusted) == (True, False)  # the base model is the best so far
    return made


def test_it_keeps_the_best_believed_weights():
    g = guard()
    assert [g.look(r, t) for r, t in ((2.0, 0.9), (1.5, 0.9), (3.0, 0.46), (2.9, 0.9))] == [
        (True, False), (False, False), (True, False), (False, False),
    ]  # fmt: skip


def test_it_stops_where_the_reward_rose_while_trust_collapsed():
    g = guard()
    assert g.look(2.0, 0.8) == (True, False)
    assert g.look(5.0, 0.44) == (False, True)  # less than half of 0.9; these weights are never the best
    assert g.best == 2.0
    assert guard().look(5.0, 0.45) == (True, False)  # exactly the floor is still believed


def test_trust_that_falls_without_a_rising_reward_is_no_exploit():
    assert guard().look(0.9, 0.9) == (False, False)  # worse than the base model: never the best
    assert guard().look(0.9, 0.1) == (False, False) and guard().look(1.0, 0.1) == (False, False)


def test_it_never_stops_without_norms_or_with_floor_zero():
    assert guard(trusted=None).look(5.0, None) == (True, False)
    assert guard(floor=0.0).look(5.0, 0.0) == (True, False)
    assert math.isnan(guard(trusted=None).first_trusted)


def looks(*lower, reward=2.0, floor=0.5):
    """What a guard says of lower bounds that follow a base model's of 0 (reward 1, bound 1)."""
    g = Guard(floor)
    g.start(1.0, 0.9, 1.0)
    return [g.look(reward, 0.9, reward - x) for x in lower]


def test_it_keeps_the_best_lower_bound_of_the_reward():
    assert [keep for keep, _ in looks(-0.1, 1.0, 1.02, 0.99, 1.03)] == [False, True, True, False, True]


def test_it_stops_where_nothing_certain_was_won_for_three_looks():
    """Of a gain of 1.0, a further 0.1 counts."""
    assert [stop for _, stop in looks(0.5, 1.0, 1.09, 1.02, 1.09)] == [False, False, False, False, True]
    assert not any(stop for _, stop in looks(0.5, 1.0, 1.09, 1.02, 1.11, 1.12, 1.13))  # 1.11 starts the count again
    assert looks(0.5, 1.0, 1.09, 1.02, 1.11, 1.12, 1.13, 1.22)[-1] == (True, True)  # 1.221 would have counted
    assert not any(stop for _, stop in looks(*[0.5] * 9, floor=0.0))
    assert not any(stop for _, stop in looks(*[-0.5] * 9, reward=1.0))  # a reward that never rose is not exploited
    assert looks(-0.2, -0.1, -0.1)[-1][1]  # it rose, but less than its bound


CALLS = []


def exploited(images, prompts):
    """A reward that rises with each call; from the 7th on nothing is trusted, from the 9th on little is certain."""
    CALLS.append(len(images))
    n = float(len(CALLS))
    value = images.mean((1, 2, 3)) + n
    trusted, bound = (torch.full((len(images),), x) for x in (float(n < 7), 0.0 if n < 9 else 10.0))
    return Scores(value, None, {"trusted": trusted, "bound": bound})


@pytest.mark.parametrize("floor, stopped", [(0.5, True), (0.0, False)])
def test_a_run_stops_and_is_judged_by_its_best_believed_weights(tmp_path, monkeypatch, floor, stopped):
    """Calls: twice before the first epoch, then training and evaluation each epoch: trust collapses in epoch 3. Without
    a floor all is believed, but the last epoch's gain is smaller than its bound."""
    CALLS.clear()
    summary = train(tmp_path / "a", monkeypatch, reward=f"{__name__}:exploited", guard=floor, epochs=4, lr=0.01)
    rows = [json.loads(x) for x in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert summary["stopped"] == (3 if stopped else None) and rows[-1]["epoch"] == (3 if stopped else 4)
    assert [r["eval_trusted"] for r in rows][:4] == [1, 1, 1, 0]
    best, last = (load_unet(tmp_path / "a" / f"{k}.pt")[2]["epoch"] for k in ("best", "last"))
    assert (best, last) == ((2, 3) if stopped else (3, 4))
    assert summary["judged"] == ("best" if stopped else "last")
    (tmp_path / "a" / "summary.json").rename(tmp_path / "summary.json")  # a run that was cut off after the stop
    assert runs.judged_by(tmp_path / "a") == summary["judged"]
    (tmp_path / "summary.json").rename(tmp_path / "a" / "summary.json")
    if stopped:  # the weights after two epochs are those that were judged
        CALLS.clear()
        short = train(tmp_path / "b", monkeypatch, reward=f"{__name__}:exploited", epochs=2, lr=0.01)
        assert short["stopped"] is None and short["kl"] == summary["kl"]


def test_a_stop_at_the_first_look_leaves_the_base_model_as_the_best(tmp_path, monkeypatch):
    CALLS.clear()
    CALLS.extend([8] * 4)  # trust collapses in the first epoch
    summary = train(tmp_path / "a", monkeypatch, reward=f"{__name__}:exploited", epochs=3, lr=0.01)
    assert summary["stopped"] == 1 and summary["kl"] == 0
    assert load_unet(tmp_path / "a" / "best.pt")[2]["epoch"] == 0
    assert runs.load_run(str(tmp_path / "a"), "", "cpu")[0]["epochs"] == 3
