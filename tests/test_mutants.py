"""Planted defects: how they are judged, on a project of two functions, and that ours apply."""

import subprocess
from pathlib import Path

import pytest

from tests.collected import missing
from tests.mutants.__main__ import main
from tests.mutants.run import read

ROOT = Path(__file__).parents[1]
PATCHES = sorted((ROOT / "tests/mutants").glob("*.patch"))

CODE = """\
def added(a, b):
    return a + b


def doubled(a):
    return 2 * a
"""
TESTS = """\
from sums import added, doubled

def test_one_and_two_are_three():
    assert added(1, 2) == 3

def test_two_and_two_are_four():
    assert added(2, 2) == 4

def test_nothing_is_ever_right():
    assert doubled(1) == 3
"""


@pytest.fixture
def project(tmp_path):
    """A repository of the code and its tests, of which nothing is committed."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "sums.py").write_text(CODE)
    (root / "test_sums.py").write_text(TESTS)
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    return root


def mutant(project, name, test, old="a + b", new="a * b", what="It is wrong.\n  Quite so."):
    code = (project / "sums.py").read_text()
    subprocess.run(["git", "add", "."], cwd=project, check=True)
    (project / "sums.py").write_text(code.replace(old, new))
    diff = subprocess.run(["git", "diff"], cwd=project, check=True, capture_output=True, text=True)
    (project / "sums.py").write_text(code)
    patch = project.parent / f"{name}.patch"
    patch.write_text(f"What: {what}\nTest: test_sums.py::{test}\n\n{diff.stdout}")
    return str(patch)


def test_a_defect_that_its_test_finds_is_killed(project, capsys):
    patch = mutant(project, "sums-product", "test_one_and_two_are_three")
    assert main([f"--root={project}", patch]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "killed           sums-product"
    assert (
        "| sums | It is wrong. Quite so. | test_sums.py::test_one_and_two_are_three | killed |"
        in lines
    )
    assert lines[-1].startswith("1 of 1 killed, in ")
    assert (project / "sums.py").read_text() == CODE


def test_each_other_outcome_is_a_failure(project, capsys):
    patches = {
        "killed": mutant(project, "killed", "test_one_and_two_are_three"),
        "LIVES": mutant(project, "equal", "test_two_and_two_are_four"),
        "FAILS WITHOUT IT": mutant(project, "fails", "test_nothing_is_ever_right"),
        "FAILS WITHOUT IT ": mutant(project, "renamed", "test_that_was_renamed"),
        "DOES NOT RUN": mutant(project, "broken", "test_two_and_two_are_four", new="a +"),
    }
    patches["DOES NOT APPLY"] = old = mutant(project, "old", "test_two_and_two_are_four")
    Path(old).write_text(Path(old).read_text().replace("-    return a + b", "-    return b"))
    assert main([f"--root={project}", *patches.values()]) == 1
    out = capsys.readouterr().out
    said = [line.rsplit(" | ", 1)[1] for line in out.splitlines() if line.startswith("| ")]
    assert said[2:] == [f"{outcome.strip()} |" for outcome in patches]
    assert "\n1 of 6 killed, " in out


def test_a_defect_that_never_ends_is_killed(project, monkeypatch):
    monkeypatch.setattr("tests.mutants.run.TIMEOUT_S", 10)
    for_ever = "next(number for number in iter(int, 1) if number)"
    patch = mutant(project, "sums-loop", "test_one_and_two_are_three", new=for_ever)
    assert main([f"--root={project}", patch]) == 0


def test_a_patch_without_a_head_is_misuse(project, capsys):
    patch = Path(mutant(project, "headless", "test_two_and_two_are_four"))
    patch.write_text(patch.read_text().replace("Test: ", ""))
    assert main([f"--root={project}", str(patch)]) == 2
    assert "must begin with `What: ` and `Test: `, found ['What']" in capsys.readouterr().err


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_every_mutant_applies(patch):
    done = subprocess.run(
        ["git", "apply", "--check", str(patch)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_mutant_names_a_test_that_is_there():
    assert missing(read(patch).test for patch in PATCHES) == set()
