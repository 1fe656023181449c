"""The rules that keep the package's parts apart."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from beam_pipelines.model.activity import ACTIVITY, EVENT_TYPES
from beam_pipelines.model.records import EVENT_TIME

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "beam_pipelines"
GENERIC = sorted(
    [path for layer in ("kernels", "transforms", "io") for path in (PACKAGE / layer).rglob("*.py")]
    + [PACKAGE / f"{name}.py" for name in "connectors query runfolder telemetry testing".split()]
)

# Words of activity alone. Sessions start and end in any pipeline.
ACTIVITYS_OWN = {*ACTIVITY.names, *EVENT_TYPES} - {EVENT_TIME, "session_start", "session_end"}


def words_in_code(source):
    """Yield (line, word) for names, attributes, arguments and strings; docstrings are free."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            found = [] if id(node) in docstrings else re.findall(r"\w+", text)
        else:
            names = (getattr(node, field, None) for field in ("id", "attr", "arg", "name"))
            found = [name for name in names if isinstance(name, str)]
        yield from ((node.lineno, word) for word in found)


def named(source):
    return sorted((line, word) for line, word in words_in_code(source) if word in ACTIVITYS_OWN)


def test_the_activity_columns_are_those_that_only_activity_may_name():
    assert {
        "user_id",
        "page_url",
        "event_type",
        "event_id",
        "page_view",
        "click",
    } == ACTIVITYS_OWN


@pytest.mark.parametrize("path", GENERIC, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_generic_code_names_no_column_of_activity(path):
    assert named(path.read_text()) == []


def test_a_column_is_found_wherever_code_names_it():
    source = '''
"""An example may name user_id."""
row["user_id"]
def f(page_url):
    """Return page_url."""
    return "SELECT event_type FROM t"
row.event_id = b"page_view"
g(click=1)
user_ids = {}
'''
    assert named(source) == [
        (3, "user_id"),
        (4, "page_url"),
        (6, "event_type"),
        (7, "event_id"),
        (7, "page_view"),
        (8, "click"),
    ]


def test_the_layers_import_one_way_only():
    lint_imports = Path(sys.executable).with_name("lint-imports")
    checked = subprocess.run(
        [lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
