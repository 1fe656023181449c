"""Planted defects: each must be caught by the test that it names.

A mutant is a patch with a head:

    What: one sentence: what the defect does to a user.
    Test: tests/path/test_file.py::test_name_that_must_fail

It is killed if the test passes without the patch and fails with it. All work is done in copies
of the tree, so nothing of it is touched.
"""

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

KILLED = "killed"
LIVES = "LIVES"
DOES_NOT_APPLY = "DOES NOT APPLY"
FAILS_WITHOUT = "FAILS WITHOUT IT"
DOES_NOT_RUN = "DOES NOT RUN"

TIMEOUT_S = 180
"""Seconds that a test may take; a mutant that goes on for ever is killed."""

_PASSED, _FAILED = 0, 1  # exit codes of pytest; others mean that no test was judged


@dataclass(frozen=True)
class Mutant:
    """A patch, what it does to a user, and the test that must fail with it."""

    patch: Path
    what: str
    test: str

    @property
    def area(self) -> str:
        """The part of the project that it is of: the first word of its name."""
        return self.patch.stem.partition("-")[0]


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant."""

    mutant: Mutant
    outcome: str


def read(patch: Path) -> Mutant:
    """Read a mutant.

    Raises:
      ValueError: its head has no What or no Test.
    """
    head = patch.read_text().partition("\ndiff --git ")[0]
    fields = dict(re.findall(r"^(What|Test):\s*(.+(?:\n[ \t]+\S.*)*)", head, re.MULTILINE))
    if fields.keys() != {"What", "Test"}:
        raise ValueError(
            f"{patch}: the lines before `diff --git` must begin with `What: ` and `Test: `, "
            f"found {sorted(fields) or 'neither'}"
        )
    return Mutant(patch, " ".join(fields["What"].split()), fields["Test"].strip())


def judged(
    root: Path, mutants: Sequence[Mutant], jobs: int, say: Callable[[str], None]
) -> list[Verdict]:
    """Judge mutants, some at a time, each in a copy of the tree of its own.

    Args:
      root: Of a git repository; what is not committed is taken as well.
      mutants: Whose tests are judged.
      jobs: How many at a time.
      say: Is given a line for each, as soon as it is known.

    Returns:
      What became of them, in their order.
    """
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(jobs):
            copies.put(_copied(root, Path(folder).resolve() / str(number)))
        copy = copies.get()
        failing = _failing(copy, {mutant.test for mutant in mutants})
        copies.put(copy)

        def judge(mutant: Mutant) -> Verdict:
            copy = copies.get()
            try:
                outcome = FAILS_WITHOUT if mutant.test in failing else _outcome(copy, mutant)
            finally:
                copies.put(copy)
            say(f"{outcome:<16} {mutant.patch.stem}")
            return Verdict(mutant, outcome)

        with ThreadPoolExecutor(jobs) as threads:
            return list(threads.map(judge, mutants))


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the lines of a table: area, what, test, outcome."""
    rows = [
        (each.mutant.area, each.mutant.what, each.mutant.test.removeprefix("tests/"), each.outcome)
        for each in verdicts
    ]
    head = ("area", "what", "test", "outcome")
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _copied(root: Path, copy: Path) -> Path:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        source = root / name
        if source.exists():  # else removed, and not yet committed
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy / name)
    return copy


def _failing(copy: Path, tests: set[str]) -> set[str]:
    """Return which tests fail as the tree is: all at once, one by one only if that fails."""
    if _tested(copy, sorted(tests)) == _PASSED:
        return set()
    return {test for test in tests if _tested(copy, [test]) != _PASSED}


def _outcome(copy: Path, mutant: Mutant) -> str:
    if not _applied(copy, mutant.patch):
        return DOES_NOT_APPLY
    code = _tested(copy, [mutant.test])
    if not _applied(copy, mutant.patch, "--reverse"):
        raise RuntimeError(f"{mutant.patch} can't be taken back: its test changes the code")
    return {_PASSED: LIVES, _FAILED: KILLED}.get(code, DOES_NOT_RUN)


def _applied(copy: Path, patch: Path, *more: str) -> bool:
    done = subprocess.run(
        ["git", "apply", *more, str(patch.resolve())],
        cwd=copy,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(copy.parent)},
        capture_output=True,
    )
    return done.returncode == 0


def _tested(copy: Path, tests: Sequence[str]) -> int:
    """Run tests; returns pytest's exit code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=copy,
        # Compiled code of before a patch could be taken for that of after it: it is told apart
        # by the second and the size of its source.
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(TIMEOUT_S * len(tests))
    except subprocess.TimeoutExpired:
        return _FAILED
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
            process.wait()
