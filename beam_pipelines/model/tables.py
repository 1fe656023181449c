"""Where result rows go and how a repeated key is merged."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

MERGES = ("greatest", "replace")


@dataclass(frozen=True)
class Table:
    """A table that rows are upserted into by their natural key.

    Sinks deliver at least once and in any order, so the merge decides what a repeated
    key leaves behind: `greatest` for values that only grow (accumulating counts),
    `replace` for rows that are emitted once and may only be repeated as they are.

    Args:
      name: Table name.
      schema: Columns and their types.
      key: Columns of the primary key.
      merge: Merge per column; the columns not named are replaced.

    Raises:
      ValueError: a key or merged column is not in the schema, a key column may be null, or a
        merge is unknown.
    """

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    merge: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for column in (*self.key, *self.merge):
            if column not in self.schema.names:
                raise ValueError(f"table {self.name}: no column {column!r}")
        for column in self.key:
            if self.schema.field(column).nullable:
                raise ValueError(
                    f"table {self.name}: key column {column!r} may be null; declare it with "
                    "nullable=False"
                )
        for column, merge in self.merge.items():
            if merge not in MERGES:
                raise ValueError(f"table {self.name}: {column} merges by {merge!r}, not {MERGES}")
            if column in self.key:
                raise ValueError(f"table {self.name}: {column} is in the key")

    @property
    def accumulates(self) -> bool:
        """Whether a merge keeps the greatest value: panes must then accumulate."""
        return "greatest" in self.merge.values()
