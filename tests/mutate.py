"""Does any wrong sign, constant, index, reduction or comparison in the maths make a test fail?

    python tests/mutate.py --count 240 --seed 0

Draws that many mutants of the files that are the papers, and of the specifications that stand in kernels/, runs the
tests against each in a copy of the package, and lists the survivors. A survivor is a hole in the specification, or a
change that changes nothing (say why below).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from kernel_faults import KERNEL_FAULTS
from orchestration_faults import ORCHESTRATION_FAULTS, SEEN_BY

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # the tests that know a file best come first
    "diffusion.py": ["test_diffusion.py", "test_rollout.py"],
    "reward_model.py": ["test_bound.py", "test_reward_model.py"],
    "rewards.py": ["test_rewards.py", "test_rpo.py"],
    "losses.py": ["test_losses.py", "test_rpo.py"],
    "metrics.py": ["test_metrics.py"],
    "kernels/ddim_step_logprob.py": ["test_diffusion.py", "test_rollout.py"],
    "kernels/preference_loss.py": ["test_losses.py", "test_rpo.py"],
}
FILES = list(TESTS)  # the papers
# Of these the papers' part alone: what the fused form is judged against.
SPECIFICATIONS = {
    "kernels/ddim_step_logprob.py": ["gaussian_log_prob", "step_gaussian", "ddim_step_logprob_reference"],
    "kernels/preference_loss.py": ["denoising_loss", "preference_margin", "preference_loss"],
}
TIMEOUT = 300  # seconds; a mutant that hangs is killed, and so are tests on a machine that is too busy
NO_TESTS = 5  # pytest's exit status where it finds none
SCRIPTS_TIMEOUT = 1800  # the same for tests that run whole scripts
DIED = -1
KERNEL_TESTS = ["tests/test_kernels.py", "tests/test_kernel_operators.py"]

# Mutants that no test can kill, because they change nothing: what their new line contains, and why.
EXPLAINED = {
    "non_blocking=False": "speed on a GPU, no number",
    "alike.sum(0)": "a symmetric matrix",
    "batch: int=6": "how many pictures are encoded at a time",
    "index_add_(-1": "a tensor of one axis",
    "flip(-1)": "a tensor of one axis",
    "cumsum(-1)": "a tensor of one axis",
    "nonzero()[:, -1]": "one column",
    "(target.to(full) - prediction.to(full))": "squared",
    "z = (mean - x) / sigma": "squared",
    "(mean_ref - mean)": "squared",
    "(truth.double() - prediction.double())": "squared",
    "(truth.double().mean() - truth.double())": "squared",
    "(images[j] - images[i])": "taken absolutely",
    "(sums / counts)[index] - x.double()": "a correlation or a square of two such differences",
    "(counts + 1) / 2 - last": "all ranks of both sides change sign, their correlation does not",
    "(counts - 1) / 2": "all ranks shift by one",
    "(counts + 2) / 2": "all ranks shift by a half",
    "(counts + 0) / 2": "all ranks shift by a half",
    "min(1.25, centre": "guards against rounding; the interval ends at 1 by itself",
    "max(0.25, centre": "guards against rounding",
    "clamp(min=-1)": "guards against rounding below zero, or indexes what is not used",
    "torch.tensor([-2])": "any negative time is the end",
    "% 2 ** 33": "other streams for epochs beyond four thousand million",
    "% 2 ** 31": "other streams for epochs beyond two thousand million",
    "keepdim=False": "broadcasts to the same",
    "value != value[-1]": "some two values differ either way",
    "int(s >> 2)": "other streams, as good",
    "generate_state(2, np.uint64)": "its first word is the same stream's",
    "def train(self, mode: bool=False)": "the mode is ignored, which is the point",
    "1.25e-12": "guards against division by zero",
    "len(value) >= 1 and (not self.told_apart)": "one value cannot differ from itself",
    "upper=True)[:, -1]": "one column",
    "len(value) > 0 and (not self.told_apart)": "one value cannot differ from itself",
    "np.uint64)[-1] for": "one word was asked for",
    "sys.path.insert(1": "second place finds the user's module too",
    "SCORED_AT_ONCE": "bounds the memory, changes no score",
    "cumprod(1 - betas, dim=-1)": "a tensor of one axis",
    "% 3 ** 32": "other streams for epochs beyond four thousand million",
    "value != value[1]": "some two values differ either way",
    "(y.double() - self(Z))": "squared",
}

SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.MatMult: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
NAMES = {
    "mean": "sum", "sum": "mean", "max": "min", "min": "max", "amax": "amin", "maximum": "minimum", "sqrt": "square",
    "square": "abs", "exp": "expm1", "log": "log1p", "abs": "square", "cumsum": "cumprod", "cumprod": "cumsum",
    "flatten": "flatten", "zeros": "ones", "ones_like": "zeros_like", "cos": "sin", "std": "var", "all": "any",
    "any": "all", "empty": "context", "round": "floor",
}  # fmt: skip


def docstrings_and_errors(tree: ast.AST) -> set[int]:
    """ids of nodes that no test should depend on: annotations, texts, and what is said when something is refused."""
    skip: set[int] = set()

    def drop(node):
        skip.update(id(n) for n in ast.walk(node))

    for node in ast.walk(tree):
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)):
            drop(node)
        if isinstance(node, ast.arg) and node.annotation:
            drop(node.annotation)
        if isinstance(node, ast.AnnAssign):
            drop(node.annotation)
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) and getattr(node, "returns", None):
            drop(node.returns)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for d in node.decorator_list:
                drop(d)
    return skip


def mutations(tree: ast.AST):
    """(node, field, replacement): every single change that is tried."""
    skip = docstrings_and_errors(tree)
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
            yield node, "op", SWAPS[type(node.op)]()
            if isinstance(node.op, ast.Sub):
                yield node, "swap", None  # a − b → b − a
        elif isinstance(node, ast.BoolOp):
            yield node, "op", SWAPS[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield node, "ops", [SWAPS[type(node.ops[0])](), *node.ops[1:]]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield node, "op", ast.UAdd()
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, "operand", ast.UnaryOp(ast.Not(), node.operand)
        elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            if isinstance(node.value, bool):
                yield node, "value", not node.value
            elif isinstance(node.value, int):
                yield node, "value", node.value + 1
                yield node, "value", node.value - 1
            else:
                yield node, "value", node.value * 1.25 if node.value else 0.25
        elif isinstance(node, ast.Attribute) and NAMES.get(node.attr, node.attr) != node.attr:
            yield node, "attr", NAMES[node.attr]


def inside(tree: ast.AST, index: int, names: list[str]) -> bool:
    """Whether mutation `index` lies in a function or class of one of these names."""
    node = list(mutations(tree))[index][0]
    kinds = (ast.FunctionDef, ast.ClassDef)
    homes = [s for s in ast.walk(tree) if isinstance(s, kinds) and s.name in names]
    return any(n is node for s in homes for n in ast.walk(s))


def apply(tree: ast.AST, index: int) -> tuple[str, str, int]:
    """Changes mutation `index` in the tree. -> old and new line of code, line number."""
    node, field, value = list(mutations(tree))[index]
    compound = (ast.FunctionDef, ast.ClassDef, ast.If, ast.For, ast.Try, ast.With)
    around = [s for s in ast.walk(tree) if isinstance(s, ast.stmt) and any(n is node for n in ast.walk(s))]
    statement = (_heads(tree, node) or [s for s in around if not isinstance(s, compound)])[-1]
    old = _head(statement)
    if field == "swap":
        node.left, node.right = node.right, node.left
    else:
        setattr(node, field, value)
    ast.fix_missing_locations(tree)
    return old, _head(statement), getattr(node, "lineno", 0)


def _heads(tree, node):
    """Compound statements in whose head (test, iterator, defaults) the node stands."""
    found = []
    for s in ast.walk(tree):
        parts = {ast.If: ["test"], ast.For: ["iter"], ast.FunctionDef: ["args"], ast.With: ["items"]}.get(type(s), [])
        for p in parts:
            values = getattr(s, p)
            for v in values if isinstance(values, list) else [values]:
                if any(n is node for n in ast.walk(v)):
                    found.append(s)
    return found


def _head(statement: ast.AST) -> str:
    return next(line for line in ast.unparse(statement).split("\n") if not line.startswith("@"))


def run(folder: str, tests: list[str], results) -> None:
    """In a fresh process: the tests against the package in `folder`."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
        import pytest

        results.put(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))


def outcome(folder: str, tests: list[str], timeout: float = TIMEOUT) -> int:
    """Exit status of the tests against the package in `folder`; DIED where the process died or hung."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=run, args=(folder, tests, results))
    process.start()
    process.join(timeout)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return results.get() if not results.empty() else DIED


@contextlib.contextmanager
def package_copy():
    """A folder with the package, its scripts and its tests, to be spoilt."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("minipref", "tests", "tutorials"):
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=shutil.ignore_patterns("__pycache__"))
        for path in [ROOT / "pyproject.toml", ROOT / "README.md", *ROOT.glob("train_*.py")]:
            shutil.copy(path, folder)
        yield folder


def kernel_faults() -> int:
    """Every listed fault in turn. -> 0 where each makes a test fail."""
    survived = 0
    with package_copy() as folder:
        if code := outcome(folder, KERNEL_TESTS):
            print(f"without any fault the tests {'take too long' if code == DIED else 'fail'}; nothing can be said")
            return 2
        for name, old, new in KERNEL_FAULTS:
            path = Path(folder) / "minipref" / "kernels" / f"{name}.py"
            text = path.read_text(encoding="utf-8")
            if text.count(old) != 1:
                raise ValueError(f"{name}: {text.count(old)} places read {old!r}")
            path.write_text(text.replace(old, new), encoding="utf-8")
            killed = outcome(folder, KERNEL_TESTS)
            path.write_text(text, encoding="utf-8")
            survived += not killed
            how = {0: "SURVIVED", DIED: "died or hung"}.get(killed, "killed")
            print(f"- {how}, {name}: {old.strip()} -> {new.strip()}", flush=True)
    print(f"{len(KERNEL_FAULTS) - survived} of {len(KERNEL_FAULTS)} faults killed")
    return int(survived > 0)


def try_faults(numbers: list[int], results) -> None:
    """In a process of its own: each of these orchestration faults in turn, in a copy of the project of its own.

    Number −1: the tests without any fault.
    """
    with package_copy() as folder:
        for number in numbers:
            name, old, new = ORCHESTRATION_FAULTS[number] if number >= 0 else ("", "", "")
            tests = SEEN_BY[name] if name else sorted({t for tests in SEEN_BY.values() for t in tests})
            path, started = Path(folder) / (name or "pyproject.toml"), time.time()
            text = path.read_text(encoding="utf-8")
            if name and text.count(old) != 1:
                raise ValueError(f"{name}: {text.count(old)} places read {old!r}")
            path.write_text(text.replace(old, new) if name else text, encoding="utf-8")
            files = [f"tests/test_{t}.py" for t in tests]
            code = outcome(folder, files, SCRIPTS_TIMEOUT)
            if not code:  # what .ci/run runs besides
                code = outcome(folder, ["-m", "slow", *files], SCRIPTS_TIMEOUT)
                code = 0 if code == NO_TESTS else code
            path.write_text(text, encoding="utf-8")
            results.put((number, code, time.time() - started))


def orchestration_faults(jobs: int, chosen: list[int]) -> int:
    """Every listed fault, `jobs` at a time. -> 0 where at least 95 % make a test fail."""
    context = multiprocessing.get_context("fork")
    results, survivors, sound = context.Queue(), list[int](), True
    every = [-1, *chosen]
    workers = [context.Process(target=try_faults, args=(every[i::jobs], results)) for i in range(jobs)]
    for worker in workers:
        worker.start()
    for count in range(1, len(every) + 1):
        number, code, seconds = results.get()
        if number < 0:
            sound = not code
            if code:
                print(
                    f"without any fault the tests {'take too long' if code == DIED else 'fail'}: no result", flush=True
                )
            continue
        name, old, new = ORCHESTRATION_FAULTS[number]
        how = {0: "SURVIVED", DIED: "died or hung"}.get(code, "killed")
        survivors += [number] if not code else []
        text = " ".join(f"{old} -> {new}".split())
        print(f"- [{count}] {how} in {seconds:.0f} s, {number}, {name}: {text}", flush=True)
    share = 1 - len(survivors) / len(chosen)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} orchestration faults killed: {share:.1%}")
    if not sound:
        print("no result: without any fault some of these tests fail, so that they kill nothing")
        return 2
    return int(share < 0.95)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="*", help="of minipref/; without it the papers' files")
    parser.add_argument("--within", default="", help="only mutants whose line of code contains this text")
    parser.add_argument("--defs", nargs="*", help="only mutants in the functions and classes of these names")
    parser.add_argument("--kernel-faults", action="store_true", help="the faults that fused kernels are prone to")
    parser.add_argument("--orchestration-faults", action="store_true", help="those of scripts, pipeline and data")
    parser.add_argument("--numbers", type=int, nargs="*", help="of the orchestration faults, only these")
    parser.add_argument("--jobs", type=int, default=2, help="orchestration faults tried at a time")
    args = parser.parse_args()

    import numpy  # noqa: F401  loaded once, before the processes are forked
    import PIL.Image  # noqa: F401
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looks without starting CUDA: the tests are forked
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if args.kernel_faults:
        return kernel_faults()
    if args.orchestration_faults:
        return orchestration_faults(args.jobs, args.numbers or list(range(len(ORCHESTRATION_FAULTS))))
    files = args.files or FILES
    trees = {f: ast.parse((ROOT / "minipref" / f).read_text(encoding="utf-8")) for f in files}
    every = [(f, i) for f, tree in trees.items() for i in range(len(list(mutations(tree))))]
    parts = {} if args.files else SPECIFICATIONS
    every = [(f, i) for f, i in every if not (names := args.defs or parts.get(f)) or inside(trees[f], i, names)]
    if args.within:
        every = [(f, i) for f, i in every if args.within in apply(copy.deepcopy(trees[f]), i)[0]]
    chosen = sorted(random.Random(args.seed).sample(every, min(args.count, len(every))))
    print(f"{len(every)} possible mutants, {len(chosen)} drawn with seed {args.seed}")

    survivors, killed, died = [], 0, 0
    with package_copy() as folder:
        # A kernel file that is asked for is spoilt as a whole: its kernels' tests belong to it.
        order = {f: [f"tests/{name}" for name in TESTS.get(f, [])] for f in files}
        order |= {f: order[f] + KERNEL_TESTS for f in args.files or [] if f.startswith("kernels/")}
        for number, (file, index) in enumerate([(None, None), *chosen]):
            if file:
                tree = copy.deepcopy(trees[file])
                old, new, line = apply(tree, index)
                (Path(folder) / "minipref" / file).write_text(ast.unparse(tree), encoding="utf-8")
            own = order[file] if file else []
            code = outcome(folder, own + sorted({t for ts in order.values() for t in ts} - set(own)))
            if not file:
                if code:
                    print(f"without a mutation the tests {'take too long' if code == DIED else 'fail'}: no result")
                    return 2
                continue
            shutil.copy(ROOT / "minipref" / file, Path(folder) / "minipref" / file)
            if code:
                killed, died = killed + 1, died + (code == DIED)
            else:
                survivors.append(f"{file}: {old} -> {new}")
                print(f"[{number}/{len(chosen)}] survived, {file}:{line}\n    {old}\n    {new}", flush=True)
    share = killed / len(chosen)
    print(f"\n{killed} of {len(chosen)} mutants killed: {share:.1%} ({died} by a crash or by running too long)")
    for s in survivors:
        reasons = [why for new, why in EXPLAINED.items() if new in s.split(" -> ")[-1]]
        print(f"- {s}\n  reason: {reasons[0] if reasons else 'none given'}")
    return 0 if share >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
