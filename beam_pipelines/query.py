"""Ask the results of a run: python -m beam_pipelines.query DATABASE SQL."""

import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import duckdb

from beam_pipelines.terminal import printable, run_command, say

USAGE = 'python -m beam_pipelines.query out/activity.duckdb "SELECT …"'


def main(argv: Sequence[str] | None = None) -> int:
    """Print what a query returns; exit code 1 where it fails, 2 for misuse."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 2:
        print(f"usage: {USAGE}", file=sys.stderr)
        return 2
    path, sql = arguments
    if not Path(path).is_file():
        say(f"{path} is no file; a run makes it: make demo")
        return 2
    try:
        with duckdb.connect(path, read_only=True) as connection:
            connection.execute("SET TimeZone = 'UTC'")
            relation = connection.sql(sql)
            if relation is not None:
                with redirect_stdout(io.StringIO()) as shown:  # it lets C1 and bidi through
                    relation.show(max_rows=50, max_width=160)
                print(printable(shown.getvalue(), keep="\n"), end="")
    except duckdb.Error as error:
        print(printable(error, keep="\n"), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
