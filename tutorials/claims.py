"""`python tutorials/claims.py`: what the papers claim, measured again in the toy world, as Markdown.

`--study rpo` varies `train_rpo.py` over subjects and seeds, `--study rl` the trust weight of `train_rl.py` over
seeds. Each run has one thread, `--jobs` run at a time. Finished runs are kept in `--out` and not run again, so that a
study can be stopped and continued, by the same code and weights.
"""

from __future__ import annotations

from minipref.runtime.config import opt, parse, run_main  # isort: skip  (first: it answers Ctrl-C)
import hashlib
import math
import re
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from minipref.metrics import t_interval
from minipref.runtime.checkpoint import check_folder, write_text
from minipref.runtime.runlog import progress, read_json, read_rows

# Name of a variant -> its flags. From the first one the others differ in one thing each, but for the paper's labels.
RPO = {
    "RPO": "",
    "similarity only": "--mode similarity",
    "preference only": "--mode preference",
    "DreamBooth with prior preservation": "--mode dreambooth",
    "arithmetic mean": "--mean arithmetic",
    "labels drawn": "--no-soft-labels",
    "reference under the instance prompt": "--reference-prompt instance",
    "noise and time shared": "--share-noise",
    "label temperature 0.1": "--label-temperature 0.1",
    "the paper's labels, drawn and by the prompt alone": "--no-soft-labels --lam-train 0",
    "labels by the prompt alone": "--lam-train 0",
    "labels by the subject alone": "--lam-train 1",
    "beta 1e-7": "--beta 1e-7",  # nothing but rounding tells it from similarity only: what chance does to a run
    "beta 0.05": "--beta 0.05",
    "beta 0.3": "--beta 0.3",
    "beta 3": "--beta 3",
    "beta 10": "--beta 10",
}
STOPPED = "similarity only, as many updates as RPO's best"  # depends on the runs of the first variant
MEASURES = {
    "true_all": "all right",
    "true_subject": "subject",
    "true_background": "background, where named",
    "true_second": "second thing, where named",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "harmonic_0.3": "harmonic 0.3",
    "harmonic_0.5": "harmonic 0.5",
}


# The same for the trust weight (PrefPaint Eq. 12).
RL = {"no weighting": "--trust off", "constant": "--trust constant", "exponential": "--trust exponential"}
RL_MEASURES = {
    "gold_after": "gold",
    "reward_after": "learned reward",
    "win_rate": "WinRate",
    "kl": "KL, nats",
    "arrival": "epochs to 90 % of the gain without weighting",
}
RL_FLAGS = "--guard 0 --eval-every 2"  # every run has the same length


@dataclass(frozen=True)
class ClaimsConfig:
    study: str = opt(
        "rpo", "rpo: train_rpo.py and its choices; rl: the trust weight of train_rl.py", choices=("rpo", "rl")
    )
    out: str = opt("", "folder of the runs and of claims.md; empty: runs/claims-rpo or runs/claims-rl")
    subjects: int = opt(6, "toy subjects of --study rpo", lo=2, hi=1000)
    first_subject: int = opt(0, "number of the first of them", lo=0, hi=999)
    seeds: int = opt(3, "seeds, of each subject", lo=1, hi=1000)
    first_seed: int = opt(0, "the first of them", lo=0, hi=999_999)
    only: str = opt("", "names of variants, separated by semicolons; empty: all")
    flags: str = opt("", 'flags for every run, such as "--lr 3e-4"')
    jobs: int = opt(2, "runs at a time", lo=1, hi=1024)


OWN = ("--subject", "--seed", "--patience", "--guard", "--eval-every", "--out", "--threads")  # flags the study sets
ROOT = Path(__file__).resolve().parents[1]

Summaries = dict[str, dict[tuple[int, int], dict]]  # variant -> (subject, seed) -> summary.json


def provenance() -> str:
    """A digest of all code and weights that a run depends on."""
    digest = hashlib.sha256()
    for path in [ROOT / "train_rl.py", ROOT / "train_rpo.py", *sorted((ROOT / "minipref").rglob("*"))]:
        if path.suffix in (".py", ".pt"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


_children: set[subprocess.Popen] = set()
_stopping = threading.Event()  # no child goes on


def run_one(folder: Path, script: str, flags: list[str]) -> dict:
    """summary.json of a run of `script` in `folder`, and its metrics as `rows`; it is run if it is not there."""
    summary = folder / "summary.json"
    if not summary.is_file():
        shutil.rmtree(folder, ignore_errors=True)  # a run that was stopped
        command = [sys.executable, str(ROOT / script), "--small", "--threads", "1", "--out", str(folder), *flags]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
            _children.add(child)
            if _stopping.is_set():  # it was started while the others were ended
                child.terminate()
            _, errors = child.communicate()
            _children.discard(child)
        if child.returncode:
            last = (errors.strip().splitlines() or ["said nothing"])[-1]
            raise ValueError(f"{shlex.join(command)}: exit code {child.returncode}: {last}")
    return read_json(summary) | {"rows": read_rows(folder / "metrics.jsonl")}


def several(cfg: ClaimsConfig, script: str, wanted: list[tuple[str, str]]) -> list[dict]:
    """Runs of (name, flags), `cfg.jobs` at a time, in their order."""

    def work(job: tuple[str, str]) -> dict:
        flags = shlex.split(cfg.flags) + job[1].split()  # a variant is what its name says: the last one counts
        name = f"{job[0]} {job[1]} {hashlib.sha256(repr(flags).encode()).hexdigest()[:6]}"
        return run_one(Path(cfg.out) / re.sub(r"[^\w.]+", "-", name).strip("-"), script, flags)

    pool = ThreadPoolExecutor(cfg.jobs)
    try:
        jobs = [pool.submit(work, job) for job in wanted]
        return [job.result() for job in progress(jobs, "runs")]
    finally:  # after an error, Ctrl-C or SIGTERM none that waits is started, and none goes on alone
        _stopping.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for child in tuple(_children):
            child.terminate()
        pool.shutdown()
        _stopping.clear()


def run_rpo(cfg: ClaimsConfig, variants: dict[str, str]) -> Summaries:
    """All variants on all subjects and seeds."""
    cases = [(s, k) for k in _seeds(cfg) for s in _subjects(cfg)]

    def runs(wanted: list[tuple[str, tuple[int, int], str]]) -> Summaries:
        jobs = [("rpo", f"--subject {s} --seed {k} --patience 0 {flags}".strip()) for _, (s, k), flags in wanted]
        found: Summaries = {name: {} for name, _, _ in wanted}
        for (name, case, _), summary in zip(wanted, several(cfg, "train_rpo.py", jobs)):
            found[name][case] = summary
        return found

    found = runs([(name, case, flags) for case in cases for name, flags in variants.items()])
    if "RPO" in found and "similarity only" in found:
        steps = {case: s["best_step"] for case, s in found["RPO"].items()}
        # At least one update, where RPO's best is the base itself.
        found |= runs([(STOPPED, case, f"--mode similarity --updates {max(1, n)}") for case, n in steps.items()])
    return found


def _seeds(cfg: ClaimsConfig) -> range:
    return range(cfg.first_seed, cfg.first_seed + cfg.seeds)


def _subjects(cfg: ClaimsConfig) -> range:
    return range(cfg.first_subject, cfg.first_subject + cfg.subjects)


def by_subject(runs: dict[tuple[int, int], dict], measure: str, which: str) -> Tensor:
    """A measure of each subject, its seeds averaged (subjects are what generalises, not seeds): (subjects,).

    NaN where no prompt asked for what it measures.
    """
    every = {case: math.nan if (v := run[measure][which]) is None else v for case, run in sorted(runs.items())}
    return torch.tensor([[v for (s, _), v in every.items() if s == i] for i in sorted({s for s, _ in runs})]).mean(1)


def _cell(values: Tensor, signed: bool = False) -> str:
    low, high = t_interval(values)
    middle = float(values.double().mean())
    return f"{middle:+.3f} ({low:+.3f} to {high:+.3f})" if signed else f"{middle:.3f} ± {(high - low) / 2:.3f}"


def table(found: Summaries) -> str:
    """Markdown: each variant's best and last step; what tells them from the first variant's best, and from each other.

    Differences are of the same subjects and seeds. The last table is about single runs: the lowest and the highest
    best step and share that is all right there, and how many have the same best step by lambda_val 0.3 and 0.7.
    """

    def rows(head: list[str], named: list[tuple[str, list[str]]]) -> list[str]:
        return ["| | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"] + [
            f"| {name} | " + " | ".join(cells) + " |" for name, cells in named
        ]

    def levels(runs: dict, which: str) -> list[str]:
        step = sum(v["steps"][which] for v in runs.values()) / len(runs)
        return [f"{step:.0f}", *(_cell(by_subject(runs, m, which)) for m in MEASURES)]

    def apart(a: dict, a_which: str, b: dict, b_which: str) -> list[str]:
        pairs = [by_subject(a, m, a_which) - by_subject(b, m, b_which) for m in MEASURES]
        return [_cell(d, signed=True) for d in pairs]

    first, base = next(iter(found.items()))
    kept = [("base", levels(base, "base"))]
    kept += [(f"{first}, best by lambda_val {lam}", levels(base, f"best {lam}")) for lam in ("0.3", "0.5", "0.7")]
    from_first = [(f"{first}, base", apart(base, "base", base, "best"))]
    within, single = [], []
    for name, runs in found.items():
        for which in ("best", "last") if name != first else ("last",):
            kept.append((f"{name}, {which}", levels(runs, which)))
            from_first.append((f"{name}, {which}", apart(runs, which, base, "best")))
        within.append((f"{name}, best − last", apart(runs, "best", runs, "last")))
        within.append((f"{name}, lambda_val 0.7 − 0.3", apart(runs, "best 0.7", runs, "best 0.3")))
        right, steps = [v["true_all"]["best"] for v in runs.values()], [v["steps"]["best"] for v in runs.values()]
        same = sum(v["steps"]["best 0.3"] == v["steps"]["best 0.7"] for v in runs.values())
        ranges = [f"{min(steps)} to {max(steps)}", f"{min(right):.2f} to {max(right):.2f}"]
        single.append((name, [*ranges, f"{same} of {len(runs)}"]))
    names = list(MEASURES.values())
    lines = rows(["step", *names], kept)
    lines += ["", f"Differences from {first}, best, of the same subjects and seeds:", "", *rows(names, from_first)]
    lines += ["", "Differences between two steps of the same runs:", "", *rows(names, within)]
    head = ["best step", "all right there", "same best step by lambda_val 0.3 and 0.7"]
    return "\n".join([*lines, "", "Single runs:", "", *rows(head, single)])


def arrival(rows: list[dict], goal: float) -> tuple[float, bool]:
    """The epoch, interpolated, at which the held-out reward first reaches `goal`, and True; else the last and False."""
    seen = [(r["epoch"], r["eval_reward"]) for r in rows if "eval_reward" in r]
    if seen[0][1] >= goal:
        return float(seen[0][0]), True
    for (e0, r0), (e1, r1) in zip(seen, seen[1:]):
        if r1 >= goal:
            return e0 + (e1 - e0) * (goal - r0) / (r1 - r0), True
    return float(seen[-1][0]), False


def rl_table(cfg: ClaimsConfig, variants: dict[str, str]) -> str:
    """Markdown: each variant over the seeds, then their differences, seed by seed."""
    jobs = [("rl", f"--seed {k} {RL_FLAGS} {flags}") for flags in variants.values() for k in _seeds(cfg)]
    every, n = several(cfg, "train_rl.py", jobs), cfg.seeds
    found = {name: every[i * n : (i + 1) * n] for i, name in enumerate(variants)}
    first = next(iter(found))
    for i, run in enumerate(found[first]):
        reward = [r["eval_reward"] for r in run["rows"] if "eval_reward" in r]
        goal = reward[0] + 0.9 * (reward[-1] - reward[0])
        for runs in found.values():
            runs[i]["arrival"], runs[i]["arrived"] = arrival(runs[i]["rows"], goal)
    values = {k: {m: torch.tensor([float(r[m]) for r in runs]) for m in RL_MEASURES} for k, runs in found.items()}
    head = ["| | " + " | ".join(RL_MEASURES.values()) + " |", "|---" * (1 + len(RL_MEASURES)) + "|"]
    lines = head + [f"| {k} | " + " | ".join(map(_cell, v.values())) + " |" for k, v in values.items()]
    lines += ["", "Differences of the same seeds:", "", *head]
    for before, name in combinations(values, 2):
        apart = [values[name][m] - values[before][m] for m in RL_MEASURES]
        lines.append(f"| {name} − {before} | " + " | ".join(_cell(a, signed=True) for a in apart) + " |")
    arrived = [f"{name} {sum(r['arrived'] for r in runs)} of {n}" for name, runs in found.items()]
    lines += ["", f"Runs that arrived (the others count as arriving at their last epoch): {', '.join(arrived)}."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    cfg = parse(ClaimsConfig, argv, prog="tutorials/claims.py", description=__doc__ or "")
    cfg = replace(cfg, out=cfg.out or f"runs/claims-{cfg.study}")
    known = RPO if cfg.study == "rpo" else RL
    chosen = [n.strip() for n in cfg.only.split(";") if n.strip()] or list(known)
    if unknown := [n for n in chosen if n not in known]:
        some = "; ".join(list(known)[:3])
        raise ValueError(f"--only: knows no variant {unknown[0][:60]!r}; this file lists {len(known)}, such as {some}")
    own = ClaimsConfig()
    if cfg.study == "rl" and (cfg.subjects, cfg.first_subject) != (own.subjects, own.first_subject):
        raise ValueError("--subjects, --first-subject: belong to --study rpo")
    if cfg.study == "rl" and cfg.seeds < 2:
        raise ValueError("--seeds 1: an interval needs two or more")
    try:
        given = [flag.partition("=")[0] for flag in shlex.split(cfg.flags)]
    except ValueError as e:
        raise ValueError(f"--flags {cfg.flags}: {e}") from e
    if taken := [flag for flag in given if flag in OWN]:
        raise ValueError(f"--flags: {taken[0]} is the study's to set")
    out, made_by = Path(cfg.out), provenance()
    check_folder(out, f"--out {out}")
    before = out / "provenance.txt"
    if out.is_dir() and any(out.iterdir()) and not before.is_file():
        raise ValueError(f"--out {out}: holds something else than a study (no provenance.txt); name another folder")
    if before.is_file() and before.read_bytes() != made_by.encode():
        raise ValueError(f"--out {out}: its runs were made by other code or weights; choose another folder")
    write_text(before, made_by)
    variants = {n: known[n] for n in known if n in chosen}
    command = f"`python tutorials/claims.py {shlex.join(sys.argv[1:] if argv is None else argv)}`"
    if cfg.study == "rpo":
        seeds = f"{cfg.seeds} seeds" if cfg.seeds > 1 else "1 seed"
        title = f"# RPO on {cfg.subjects} toy subjects, {seeds} each ({cfg.subjects * cfg.seeds} runs a line)"
        note = (
            "Shares and scores on test prompts that nothing was chosen by. CLIP-I and CLIP-T come from the encoder"
            " that also chose the step. Every run goes on to its last update (`--patience 0`). 95 % intervals:"
            " Student's t over the subjects."
        )
        lines = [title, "", command, "", note, "", table(run_rpo(cfg, variants))]
    else:
        title = f"# The trust weight, {cfg.seeds} seeds"
        lines = [title, "", command, "", "95 % intervals: Student's t over the seeds.", "", rl_table(cfg, variants)]
    text = "\n".join(lines)
    write_text(out / "claims.md", text + "\n")
    print(text)


if __name__ == "__main__":
    run_main("tutorials/claims.py", main)
