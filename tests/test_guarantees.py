"""What docs/guarantees.md promises is shown by tests that exist."""

import re
from pathlib import Path

from tests.collected import missing

PAGE = Path(__file__).parent.parent / "docs" / "guarantees.md"


def test_every_test_that_a_promise_names_is_collected():
    named = re.findall(r"`(tests/[\w/]+\.py::[\w:]+)`", PAGE.read_text())
    assert len(named) > 30
    assert missing(named) == set()


def test_every_promise_names_a_test():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not re.match(r"\| (what|---)", row)]
    assert promises
    assert [row for row in promises if "`tests/" not in row] == []
