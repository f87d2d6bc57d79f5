"""The study that measures the papers' claims: which runs it makes, how it averages, and what it calls uncertain."""

import subprocess
import sys
import time

import claims
import pytest

WHICH = ("base", "best", "last", "best 0.3", "best 0.5", "best 0.7")


def summary(best_step=60, best=None, **values):
    """A run's summary in which every measure has the same value; `values` for the columns."""
    row = dict.fromkeys(WHICH, 0.5 if best is None else best) | {"base": 0.0} | values
    steps = {"base": 0, "last": 240} | {v: best_step for v in WHICH if v.startswith("best")}
    return {m: row for m in claims.MEASURES} | {"steps": steps, "best_step": best_step}


def test_seeds_are_averaged_within_a_subject_and_differences_are_paired():
    runs = {(s, k): summary(best=0.1 * s + 0.02 * k, last=0.25) for s in (3, 4, 5) for k in (0, 1)}
    assert claims.by_subject(runs, "clip_i", "best").tolist() == pytest.approx([0.31, 0.41, 0.51])
    other = {case: summary(best=v["clip_i"]["best"] - 0.2, last=0.0) for case, v in runs.items()}
    lines = claims.table({"RPO": runs, "similarity only": other}).splitlines()
    n = len(claims.MEASURES)
    # The subjects differ much among themselves (± 0.248 = 4.3027·0.1/√3), the pairs not at all.
    assert next(x for x in lines if x.startswith("| RPO, last | 240 |")).count("0.250 ± 0.000") == n
    assert next(x for x in lines if x.startswith("| similarity only, best | 60 |")).count("0.210 ± 0.248") == n
    assert sum("| similarity only, best | -0.200 (-0.200 to -0.200) |" in x for x in lines) == 1
    assert sum(x.startswith("| RPO, last | -0.160 (-0.408 to +0.088)") for x in lines) == 1


def test_every_cell_is_that_of_its_line_and_column():
    """Measure m of column w of variant v is 100·v + 10·w + m: each cell is found again by its digits."""

    def run(v):
        cells = {
            m: {w: float(100 * v + 10 * i + j) for i, w in enumerate(WHICH)} for j, m in enumerate(claims.MEASURES)
        }
        return cells | {"steps": {w: 1000 * v + i for i, w in enumerate(WHICH)}}

    both = {name: {case: run(v) for case in ((0, 0), (1, 0))} for v, name in enumerate(("RPO", "other"))}
    blocks = claims.table(both).split("\n\n")[::2]
    found = []
    for lines in (block.splitlines()[2:] for block in blocks[:3]):
        rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
        found.append({name: [float(c.split()[0]) for c in cells] for name, *cells in rows})
    n = len(claims.MEASURES)
    expected = {"base": (0, 0), "RPO, best": (0, 1), "RPO, last": (0, 2), "other, best": (1, 1), "other, last": (1, 2)}
    expected |= {f"RPO, best by lambda_val 0.{k}": (0, i) for i, k in ((3, 3), (4, 5), (5, 7))}
    for name, (v, i) in expected.items():
        if name != "RPO, best":
            assert found[0].pop(name) == [1000 * v + i] + [100 * v + 10 * i + j for j in range(n)], name
    differences = {"RPO, base": -10, "RPO, last": 10, "other, best": 100, "other, last": 110}
    assert found[1] == {name: [d] * n for name, d in differences.items()}
    within = {f"{v}, {pair}": d for v in both for pair, d in (("best − last", -10), ("lambda_val 0.7 − 0.3", 20))}
    assert found[2] == {name: [d] * n for name, d in within.items()} and found[0] == {}


def test_single_runs_show_how_far_apart_they_lie_and_how_often_lambda_val_changes_the_step():
    right, steps = (0.1, 0.7, 0.4, 0.3), ((40, 40), (40, 80), (80, 80), (80, 80))
    runs = {(i, 0): summary(best=r, last=0.9) for i, r in enumerate(right)}
    for i, (run, (low, high)) in enumerate(zip(runs.values(), steps)):
        run["steps"] |= {"best 0.3": low, "best 0.7": high, "best": 60 + 20 * i}
    assert claims.table({"RPO": runs}).splitlines()[-1] == "| RPO | 60 to 120 | 0.10 to 0.70 | 3 of 4 |"


def test_the_variants_are_what_they_are_called():
    for name, flags in {
        "similarity only": "--mode similarity", "preference only": "--mode preference",
        "DreamBooth with prior preservation": "--mode dreambooth", "arithmetic mean": "--mean arithmetic",
        "labels drawn": "--no-soft-labels", "reference under the instance prompt": "--reference-prompt instance",
        "noise and time shared": "--share-noise", "label temperature 0.1": "--label-temperature 0.1",
        "the paper's labels, drawn and by the prompt alone": "--no-soft-labels --lam-train 0",
        "labels by the prompt alone": "--lam-train 0", "labels by the subject alone": "--lam-train 1", "RPO": "",
    }.items():  # fmt: skip
        assert claims.RPO[name] == flags
    for name in [n for n in claims.RPO if n.startswith("beta ")]:
        assert claims.RPO[name] == f"--{name}"
    assert claims.RL == {k: f"--trust {v}" for k, v in (
        ("no weighting", "off"), ("constant", "constant"), ("exponential", "exponential")
    )}  # fmt: skip


def test_other_code_or_weights_are_other_runs(monkeypatch, tmp_path):
    for name in ("train_rl.py", "train_rpo.py", "minipref/a.py", "minipref/weights/small/unet.pt", "minipref/a.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    before = claims.provenance()
    for name, counts in (
        ("train_rl.py", True), ("train_rpo.py", True), ("minipref/a.py", True),
        ("minipref/weights/small/unet.pt", True), ("minipref/a.json", False),
    ):  # fmt: skip
        (tmp_path / name).write_text("2")
        assert (claims.provenance() != before) == counts, name
        (tmp_path / name).write_text("1")


def test_variants_differ_from_the_first_and_run_on_the_same_cases(tmp_path, monkeypatch):
    """The flags of all runs come first, so that a variant's own count; the runs that stop where RPO's best lies stop
    where it lies for their subject and seed."""
    asked = []

    def made(folder, script, flags):
        asked.append((folder, " ".join(flags)))
        return summary(40 + 10 * int(flags[flags.index("--subject") + 1]) + int(flags[flags.index("--seed") + 1]))

    monkeypatch.setattr(claims, "run_one", made)
    argv = "--subjects 2 --seeds 2 --first-seed 7".split()
    claims.main(["--out", str(tmp_path), *argv, "--flags", "--beta 1 --updates 100"])
    expected = set()
    for case in [(s, k) for k in (7, 8) for s in (0, 1)]:
        stopped = f"--mode similarity --updates {40 + 10 * case[0] + case[1]}"
        start = f"--beta 1 --updates 100 --subject {case[0]} --seed {case[1]} --patience 0"
        expected |= {f"{start} {v}".strip() for v in [*claims.RPO.values(), stopped]}
    assert {f for _, f in asked} == expected and len(asked) == len(expected)
    assert len({folder for folder, _ in asked}) == len(expected)  # none overwrites another's
    assert (tmp_path / "claims.md").read_text().count("\n| RPO, last |") == 2
    for argv, said in (
        (["--only", "x"], "--only: knows no variant 'x'"),
        (["--flags", "--lr 1 --seed=5"], "--seed is the study's to set"),
        (["--flags", "--patience 4"], "--patience is the study's to set"),
        (["--flags", "--lr 'x"], "--flags --lr 'x: No closing quotation"),
        (["--study", "rl", "--subjects", "3"], "--subjects, --first-subject: belong to --study rpo"),
    ):
        with pytest.raises(ValueError, match=said):
            claims.main(["--out", str(tmp_path), *argv])
    (tmp_path / "provenance.txt").write_text("another")
    with pytest.raises(ValueError, match="made by other code or weights; choose another folder"):
        claims.main(["--out", str(tmp_path)])


def test_after_an_error_no_further_run_is_started(tmp_path, monkeypatch):
    asked = []

    def fails(folder, script, flags):
        asked.append(flags)
        if len(asked) > 1:
            time.sleep(0.05)  # 13 seconds for all of them
            return summary(40)
        raise ValueError("this one")

    monkeypatch.setattr(claims, "run_one", fails)
    with pytest.raises(ValueError, match="this one"):
        claims.main(["--out", str(tmp_path), "--jobs", "1"])
    assert len(asked) < len(claims.RPO) * 6 * 3


def test_a_finished_run_is_kept_and_a_failed_one_tells_why(tmp_path, monkeypatch):
    done = tmp_path / "done"
    done.mkdir()
    (done / "summary.json").write_text('{"best_step": 3}')
    (done / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1}\n')
    assert claims.run_one(done, "train_rpo.py", []) == {"best_step": 3, "rows": [{"epoch": 0}, {"epoch": 1}]}
    half = tmp_path / "half"
    half.mkdir()
    (half / "last.pt").write_text("cut short")
    code = "import sys; sys.stderr.write('noise\\ntrain_rpo.py: --lr 1: what is wrong\\n'); sys.exit(2)"
    start, ended = subprocess.Popen, [[sys.executable, "-c", code], ["sh", "-c", "kill -9 $$"]]
    monkeypatch.setattr(subprocess, "Popen", lambda command, **k: start(ended.pop(0), **k))
    with pytest.raises(ValueError, match="--lr 1: exit code 2: train_rpo.py: --lr 1: what is wrong"):
        claims.run_one(half, "train_rpo.py", ["--lr", "1"])
    with pytest.raises(ValueError, match="exit code -9: said nothing"):
        claims.run_one(half, "train_rpo.py", [])


def test_the_trust_weights_are_compared_seed_by_seed(tmp_path, monkeypatch):
    """Seed 1's gold is 1 higher than seed 0's for every variant; exponential gains 0.5 on both and arrives earlier.

    A constant weight arrives at the last epoch with seed 0 and never with seed 1: the table tells which.
    """
    asked = []

    def made(folder, script, flags):
        asked.append((script, " ".join(flags)))
        seed, trust = int(flags[1]), flags[-1]
        ways = {"off": (0.0, 0.4, 1.0), "exponential": (0.0, 0.8, 1.0), "constant": (0.0, 0.4, 0.9 - 0.1 * seed)}
        rows = [{"epoch": 20 * i, "eval_reward": 2 + r} for i, r in enumerate(ways[trust])]  # the gain counts
        done = {
            "gold_after": 5 + seed + 0.5 * (trust == "exponential"),
            "reward_after": 1.0,
            "win_rate": 0.7,
            "kl": 9.0,
        }
        return done | {"rows": [*rows, {"epoch": 41}]}

    monkeypatch.setattr(claims, "run_one", made)
    claims.main(["--study", "rl", "--seeds", "2", "--out", str(tmp_path)])
    assert [s for s, _ in asked] == ["train_rl.py"] * 6
    assert asked[0][1] == "--seed 0 --guard 0 --eval-every 2 --trust off" and len({f for _, f in asked}) == 6
    lines = (tmp_path / "claims.md").read_text().splitlines()
    cells = {tuple(x.split(" | ")[:2])[0].strip("| "): x.split(" | ") for x in lines if x.startswith("| ")}
    # Without weighting 0.9 of the gain is reached at 20 + 20·(0.5/0.6), with it at 20 + 20·(0.1/0.2).
    off, with_it = 20 + 20 * 5 / 6, 30
    for pair, apart in (
        ("exponential − no weighting", with_it - off), ("exponential − constant", with_it - 40),
        ("constant − no weighting", 40 - off),
    ):  # fmt: skip
        gold = 0.5 if "exponential" in pair else 0
        assert cells[pair][1].startswith(f"{gold:+.3f} ({gold:+.3f} to {gold:+.3f})")
        assert cells[pair][5].startswith(f"{apart:+.3f}")
    assert cells["no weighting"][1] == "5.500 ± 6.353"  # 12.7062·(√½)/√2
    assert cells["constant"][5].startswith("40.000 ± 0.000")
    counted = "Runs that arrived (the others count as arriving at their last epoch): "
    assert lines[-1] == f"{counted}no weighting 2 of 2, constant 1 of 2, exponential 2 of 2."
    with pytest.raises(ValueError, match="an interval needs two"):
        claims.main(["--study", "rl", "--seeds", "1", "--out", str(tmp_path)])


def test_arrival_is_interpolated_and_says_whether_it_ever_comes():
    """A run that arrives at its last epoch is told from one that never does."""
    rows = [{"epoch": e, "eval_reward": r} for e, r in ((0, 0.0), (10, 0.5), (20, 0.4), (30, 1.0))] + [{"epoch": 31}]
    assert claims.arrival(rows, 0.25) == (5, True) and claims.arrival(rows, 0.0) == (0, True)
    assert claims.arrival(rows, 0.7) == (pytest.approx(25), True)
    assert claims.arrival(rows, 1.0) == (30, True)
    falls = [{"epoch": e, "eval_reward": r} for e, r in ((0, 1.0), (10, 0.5), (20, 1.0))]
    assert claims.arrival(falls, 0.9) == (0, True)  # it was there before it fell
    assert claims.arrival(rows, 2.0) == (30, False) == claims.arrival(rows, 1.0 + 1e-9)


def test_the_study_is_run_as_its_file_says():
    """`python tutorials/claims.py` from any folder finds the library and the scripts."""
    path = claims.ROOT / "tutorials" / "claims.py"
    done = subprocess.run(
        [sys.executable, path, "--study", "rl", "--seeds", "1"], cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr == "tutorials/claims.py: --seeds 1: an interval needs two or more\n"
    assert all((claims.ROOT / name).is_file() for name in ("train_rl.py", "train_rpo.py", "minipref/__init__.py"))
