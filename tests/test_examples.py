import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_example_of_the_readme_counts_each_order_once():
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / "orders_per_minute.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(ran.stdout.splitlines()) == [
        "2026-01-05 09:00:00+00:00 Porto 2",
        "2026-01-05 09:01:00+00:00 Lyon 1",
    ]


def test_the_readme_shows_the_example_as_it_is():
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    assert (EXAMPLES / "orders_per_minute.py").read_text(encoding="utf-8") in readme
