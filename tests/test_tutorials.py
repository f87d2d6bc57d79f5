"""Tutorials run top to bottom; exercises fail before and pass after; links, functions and anchors exist.

What executes a whole tutorial is marked `tutorial` and has its own command: `python -m pytest -m tutorial`.
"""

import importlib.util
import json
import re
import sys
from types import SimpleNamespace

import pytest
import run as T
import torch

FILES = sorted(T.FOLDER.glob("[0-9]*_*.md"))
EQUATIONS = T.FOLDER / "EQUATIONS.md"
NUMBERS = [int(p.name.partition("_")[0]) for p in FILES]


@pytest.fixture(autouse=True)
def figures_elsewhere(tmp_path, monkeypatch):
    """Tests draw no figure into the repository. Tutorials find the scripts one folder up, as they do there."""
    folder = tmp_path / "tutorials"
    (folder / "figures").mkdir(parents=True)
    for p in FILES:
        (folder / p.name).write_bytes(p.read_bytes())
    for script in T.FOLDER.parent.glob("train_*.py"):
        (tmp_path / script.name).symlink_to(script)
    monkeypatch.setattr(T, "FOLDER", folder)


@pytest.mark.tutorial
@pytest.mark.parametrize("number", NUMBERS)
def test_a_tutorial_runs_its_exercises_check_themselves_and_it_draws_what_it_shows(number):
    """Every exercise where it stands: with the lines given it fails and says something, with our solution it passes."""
    path, names, tried = T.find(number), {"__name__": "tutorial"}, 0
    text = path.read_text(encoding="utf-8")
    solutions = {f.number: f.code for f in T.fences(text) if f.kind == "solution"}
    torch.manual_seed(0)
    for fence in T.fences(text):
        if fence.kind == "exercise":
            with torch.random.fork_rng():
                with pytest.raises(AssertionError, match=".+"):
                    T.attempt(fence, T.given(fence)[1], dict(names), path)
                T.attempt(fence, solutions[fence.number], dict(names), path)
            tried += 1
        elif not fence.kind:
            T.execute(fence.code, names, path, fence.line)
    assert tried == len(solutions) and 2 <= tried <= 4
    shown = re.findall(r"!\[[^\]]+\]\((figures/[^)]+)\)", text)
    drawn = {f"figures/{p.name}" for p in (T.FOLDER / "figures").iterdir()}
    assert shown and set(shown) == drawn


def anchors(path):
    """What the headings of a Markdown file are called in links."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]


LINKING = [T.FOLDER.parent / "README.md", *FILES, *(T.FOLDER / f"{k}.md" for k in ("LOG", "RESULTS", "REFERENCE"))]


@pytest.mark.parametrize("path", [*LINKING, EQUATIONS], ids=lambda p: p.name)
def test_every_link_leads_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)  # code has brackets too
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if not target.startswith("http"):
            there = path.parent / target if target else path
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), anchor
    # A function that links to its file is defined there.
    for name, target in re.findall(r"\[`([A-Za-z_]+)`\]\((\.\./[^)]+\.py)\)", text):
        code = (path.parent / target).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(def|class) {name}\b", code, re.M), f"{name} is not in {target}"


def test_every_equation_has_a_function_a_test_and_a_tutorial():
    """PrefPaint's 1 to 12 and RPO's 4 to 8, without a gap."""
    root = EQUATIONS.parent.parent
    tables = EQUATIONS.read_text(encoding="utf-8").split("\n## ")[1:]
    for table, wanted in zip(tables, (range(1, 13), range(4, 9)), strict=True):
        rows = re.findall(r"^\| (.+?) \| .+? \| `(.+?):(.+?)` \| `(.+?):(.+?)` \| \[\d\]\((.+?)\) \|$", table, re.M)
        assert {int(n) for row in rows for n in re.findall(r"\d+", row[0])} == set(wanted)
        for equation, file, function, test_file, test, tutorial in rows:
            said = (EQUATIONS.parent / tutorial).read_text(encoding="utf-8")
            assert re.search(rf"Eqs?\. ?({'|'.join(re.findall(r'[0-9]+', equation))})\b", said), (
                f"{tutorial}: Eq. {equation}"
            )
            assert re.search(rf"^\s*def {function}\b", (root / file).read_text(encoding="utf-8"), re.M), function
            assert re.search(rf"^def {test}\b", (root / test_file).read_text(encoding="utf-8"), re.M), test
            assert (EQUATIONS.parent / tutorial).exists(), tutorial


@pytest.mark.parametrize("number", NUMBERS)
def test_a_tutorial_has_its_parts(number):
    text = T.find(number).read_text(encoding="utf-8")
    for heading in ("## What the paper says", "## What did not work"):
        assert heading in text
    assert f"python tutorials/run.py {number}" in text and "```math" in text


def test_errors_name_the_line_of_the_markdown_file(tmp_path):
    path = tmp_path / "x.md"
    with pytest.raises(ZeroDivisionError) as e:
        T.execute("a = 1\n1 / 0\n", {}, path, 40)
    assert e.traceback[-1].lineno + 1 == 41 and str(e.traceback[-1].path).endswith("x.md")


def test_unknown_tutorials_and_exercises_are_one_line(capsys, tmp_path):
    with pytest.raises(ValueError, match="tutorial 99: there is none; choose from"):
        T.find(99)
    with pytest.raises(ValueError, match="no exercise 9; there are 1, 2"):
        T.try_exercise(5, 9, None)
    (tmp_path / "mine.py").write_text("centred = rewards\n")
    with pytest.raises(ValueError, match="exercise 1: not yet. the mean is each group"):
        T.main(["5", "--exercise", "1", "--answer", str(tmp_path / "mine.py")])
    T.main(["5", "--exercise", "1"])
    assert "exercise 1: our solution passes; try yours by --answer FILE" in capsys.readouterr().out


@pytest.mark.parametrize(
    "lines,said",
    [
        ("x = (1\n", "exercise 1: mine.py:1: SyntaxError: '(' was never closed"),
        ("x = 1\ny = nothing\n", "exercise 1: mine.py:2: NameError: name 'nothing' is not defined"),
        ("x = 1 / 0\n", "exercise 1: mine.py:1: ZeroDivisionError: division by zero"),
        ("x = 1\n", "exercise 1: 1_x.md:8: your lines must set 'answer'"),
        ("answer = 1\n", "exercise 1: not yet. twice two .1_x.md:8."),
    ],
)
def test_what_is_wrong_with_an_answer_is_said_with_file_and_line(tmp_path, monkeypatch, lines, said):
    monkeypatch.setattr(T, "FOLDER", tmp_path)
    code = f"two = 2\n{T.YOURS}\nanswer = 0\n{T.CHECK}\nassert answer == 2 * two, 'twice two'\n"
    (tmp_path / "1_x.md").write_text(f"# X\n\n```python exercise=1\n{code}```\n")
    mine = tmp_path / "mine.py"
    mine.write_text(lines)
    argv = ["1", "--exercise", "1", "--answer", str(mine)]
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        T.main(argv)
    mine.write_text("answer = 2 * two\n")
    T.main(argv)


TINY = (
    "--small --epochs 1 --prompts 2 --samples 2 --sampling-steps 3 --train-steps 2"
    " --eval-every 1 --eval-prompts 8 --win-prompts 8"
)


def train_rl(module, tmp_path, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *TINY.split(), "--out", str(tmp_path / "run"), *more])
        module.main()
    return json.loads((tmp_path / "run" / "summary.json").read_text())


def test_the_reward_of_your_own_is_a_function_in_a_file(tmp_path, monkeypatch):
    """README's, as it stands there."""
    readme = (EQUATIONS.parent.parent / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(def redness.*?)```", readme, re.S)[1]
    told = re.search(r"own_reward = '''\n(.*?)'''", T.find(8).read_text(encoding="utf-8"), re.S)[1]
    red = torch.zeros(2, 3, 4, 4)
    red[0, 0], red[1, 2] = 1, 1  # one red picture, one blue
    holes = torch.zeros(2, 1, 4, 4)
    holes[:, :, 1:3] = 1
    for text in (code, told):
        names: dict = {}
        exec(text, names)
        assert names["redness"](red, SimpleNamespace(masks=holes)).tolist() == [1, -1]
    (tmp_path / "myrewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    import train_rl as script

    monkeypatch.delitem(sys.modules, "myrewards", raising=False)
    train_rl(script, tmp_path, "--reward", "myrewards:redness")
    assert sys.modules["myrewards"].__file__ == str(tmp_path / "myrewards.py")  # the user's folder counts


def test_the_algorithm_of_your_own_is_a_short_diff_that_applies_and_runs(tmp_path):
    """The tutorial's diff, applied by hand to train_rl.py: fewer than forty changed lines, and another run."""
    text = T.find(8).read_text(encoding="utf-8")
    hunk = re.search(r"^```diff\n(.*?)^```$", text, re.M | re.S)[1].splitlines()
    removed = [line[1:] for line in hunk if line[0] in "- "]
    added = [line[1:] for line in hunk if line[0] in "+ "]
    assert sum(line[0] in "+-" for line in hunk) < 40
    source = (EQUATIONS.parent.parent / "train_rl.py").read_text(encoding="utf-8")
    assert source.count("\n".join(removed) + "\n") == 1
    changed = source.replace("\n".join(removed) + "\n", "\n".join(added) + "\n")
    (tmp_path / "train_best.py").write_text(changed)
    spec = importlib.util.spec_from_file_location("train_best", tmp_path / "train_best.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_best"] = module
    spec.loader.exec_module(module)
    weights, true = [], module.clipped_surrogate

    def seen(log_prob, old, advantage, **more):
        weights.extend(advantage.tolist())
        return true(log_prob, old, advantage, **more)

    module.clipped_surrogate = seen
    train_rl(module, tmp_path)
    # Two prompts, two completions each: the better one weighs 2, the other nothing.
    assert set(weights) == {0.0, 2.0} and weights.count(0.0) == weights.count(2.0)
