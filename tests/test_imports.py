"""Imports go one way through the house, and only the core dependencies are asked for."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = {"torch", "numpy", "PIL", "tqdm"}
PAPERS = {"diffusion", "losses", "reward_model", "rewards", "metrics", "guard"}
LEVELS = [  # from the ground up; a room imports what lies below it
    {"runtime", "kernels"}, {"models"}, {"data"}, PAPERS, {"presets"}, {"pipeline"}, {"runs", "figures"},
    {"commands", "__main__"},
]  # fmt: skip
SCRIPTS = {p.stem for p in (*ROOT.glob("train_*.py"), *ROOT.glob("tutorials/*.py"))}


def imports(source: str, package: tuple[str, ...]) -> list[str]:
    """Dotted names of all that a file of `package` imports, inside functions too; what only type checkers read is none.

    `from .a import b` in minipref/data is "minipref.data.a.b", whether b is a module or not.
    """
    names, nodes = [], [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            home = ".".join([*above, *([node.module] if node.module else [])])
            names += [f"{home}.{a.name}" for a in node.names]
    return names


def of_file(path: Path) -> list[str]:
    return imports(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parent.parts)


def level(room: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if room in names)


def fault(own: str, name: str) -> str:
    """What is wrong with an import of `name` by the file `own`, both dotted ("minipref.data.masks"); "" if nothing."""
    here, there = own.split(".")[1:], name.split(".")
    if there[0] in SCRIPTS:
        return "a script is imported by nothing in the library"
    if there[0] != "minipref" or there[1] == "__version__":
        return ""
    there = there[1:]
    if here[0] == there[0] == "commands":
        return "" if there[1].startswith(f"{here[1]}_") else "a command imports its own helpers only"
    if here[0] == there[0]:
        return ""
    if there[0] == "toy":
        return "" if here[0] == "commands" else "only commands import the toy"
    if here[0] == "toy":
        return "" if level(there[0]) <= level("data") else "the toy imports data and what lies below"
    if {here[0], there[0]} <= PAPERS or level(there[0]) < level(here[0]):
        return ""
    return f"{there[0]} does not lie below {here[0]}"


FILES = [p for p in sorted((ROOT / "minipref").rglob("*.py")) if p != ROOT / "minipref" / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    faults = {f"{own} imports {name}: {why}" for name in of_file(path) if (why := fault(own, name))}
    assert not faults, faults


def test_the_library_has_no_other_rooms():
    rooms = {p.relative_to(ROOT / "minipref").parts[0].removesuffix(".py") for p in FILES}
    assert rooms == set().union(*LEVELS) | {"toy"}
    assert sum(len(of_file(p)) for p in FILES) > 250  # that many were looked at


@pytest.mark.parametrize("path", sorted(ROOT.glob("train_*.py")), ids=lambda p: p.name)
def test_a_script_imports_no_command_and_no_other_script(path):
    for name in of_file(path):
        assert name.split(".")[0] not in SCRIPTS and not name.startswith("minipref.commands"), name


@pytest.mark.parametrize(
    "own,name,ok",
    [
        ("minipref.losses", "minipref.kernels.preference_loss.same_shape", True),
        ("minipref.kernels.common", "minipref.runtime.draw", False),
        ("minipref.models.unet", "minipref.data.masks", False),
        ("minipref.data.prompts", "minipref.models.tokenizer", True),
        ("minipref.rewards", "minipref.reward_model.Scores", True),
        ("minipref.rewards", "minipref.pipeline.Pipeline", False),
        ("minipref.presets", "minipref.diffusion.ScheduleConfig", True),
        ("minipref.pipeline", "minipref.runs.load_run", False),
        ("minipref.figures", "minipref.runs.load_run", False),
        ("minipref.figures", "minipref.toy.world", False),
        ("minipref.toy.raters", "minipref.data.ratings", True),
        ("minipref.toy.raters", "minipref.metrics", False),
        ("minipref.commands.sample", "minipref.toy.world.prompt_source", True),
        ("minipref.commands.sample", "minipref.commands.evaluate", False),
        ("minipref.commands.bench", "minipref.commands.bench_kernels.kernel_table", True),
        ("minipref.commands.bench_kernels", "minipref.commands.bench.machine", False),
        ("minipref.runs", "minipref.commands.evaluate", False),
        ("minipref.commands.bench", "train_rl.main", False),
        ("minipref.runtime.runlog", "minipref.__version__", True),
    ],
)
def test_the_order_of_the_rooms(own, name, ok):
    assert (fault(own, name) == "") == ok


def test_imports_are_found_wherever_they_stand():
    source = """
import a.b
from . import one
from ..two import three as four
if TYPE_CHECKING:
    from . import five
    def f():
        import six
else:
    from .seven import eight
def g():
    if True:
        from nine.ten import eleven, twelve
"""
    expected = {"a.b", "p.q.one", "p.two.three", "p.q.seven.eight", "nine.ten.eleven", "nine.ten.twelve"}
    found = imports(source, ("p", "q"))
    assert set(found) == expected and len(found) == len(expected)


def test_modules_are_named_at_run_time_in_two_places_alone():
    """By the list of commands, and where a reward of the user's own is named: no import hides from the tests above."""
    calls = {(p.name, c) for p in FILES for c in ("import_module", "__import__") if c in p.read_text(encoding="utf-8")}
    assert calls == {("__main__.py", "import_module"), ("rewards.py", "import_module")}


def test_only_the_core_dependencies_are_imported():
    files = [*FILES, *ROOT.glob("train_*.py"), *ROOT.glob("tutorials/*.py")]
    packages = {(name.split(".")[0], f.name) for f in files for name in of_file(f)}
    # Optional: asked for in one place each, which says what happens without it.
    packages -= {("triton", "common.py"), ("diffusers", "bench.py"), ("diffusers", "bench_lean.py")}
    outside = {p for p, _ in packages} - set(sys.stdlib_module_names) - {"minipref", *SCRIPTS}
    assert outside <= CORE, outside - CORE
