"""Ask the results of a run: python -m beam_pipelines.query DATABASE SQL."""

import sys
from collections.abc import Sequence
from pathlib import Path

import duckdb

USAGE = 'python -m beam_pipelines.query out/activity.duckdb "SELECT …"'


def main(argv: Sequence[str] | None = None) -> int:
    """Print what a query returns; exit code 1 where it fails, 2 for misuse."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 2:
        print(f"usage: {USAGE}", file=sys.stderr)
        return 2
    path, sql = arguments
    if not Path(path).is_file():
        print(f"{path} does not exist; a run makes it: make demo", file=sys.stderr)
        return 2
    try:
        with duckdb.connect(path, read_only=True) as connection:
            connection.execute("SET TimeZone = 'UTC'")
            relation = connection.sql(sql)
            if relation is not None:
                relation.show(max_rows=50, max_width=160)
    except duckdb.Error as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
