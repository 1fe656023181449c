"""State as a journal, with a derived table kept in memory between bundles.

Beam state holds the truth: bags of pages, appended to and never rewritten. What a DoFn
asks of it (has this id been seen?) wants a table, which is costly to build. So the worker
keeps the table it derived, but trusts it only while it provably matches the journal: each
bundle that changes a journal commits a new random token with it, and the table is used
only if the token it was left with equals the token in state. After a failed bundle, a
retry, or a key that moved to another worker and back, the tokens differ, and the table is
derived from the pages again. (A version number could match by accident: two attempts at
one bundle would count alike.)

Contract, for a DoFn that keeps one:

- call `start_bundle` and `finish_bundle` from the DoFn's methods of those names;
- read through `table`, change only through `append` and `clear`, with the states of the
  key that is being processed;
- pages are bytes, and the table is a function of the pages in any order.

A table in use is taken out of the cache until its bundle ends, so a bundle that fails, or
a zombie that works on, leaves no table behind. The cache is bounded by bytes, the least
recently used go first; without a cached table everything is slower and nothing else.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar

CACHE_BYTES = 1 << 30
"""Memory the tables of one worker process may take between bundles."""


class Sized(Protocol):
    """A table that knows its size."""

    @property
    def nbytes(self) -> int:
        """Memory it takes."""


T = TypeVar("T", bound=Sized)


class _Cache:
    """Tables of one process, by (stage, key), with the token each was left with."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._tables: OrderedDict[Any, tuple[bytes, Any]] = OrderedDict()
        self._bytes = 0

    def take(self, key: Any) -> tuple[bytes, Any] | None:
        with self._lock:
            found = self._tables.pop(key, None)
            if found is not None:
                self._bytes -= found[1].nbytes
            return found

    def leave(self, key: Any, token: bytes, table: Any) -> None:
        with self._lock:
            before = self._tables.pop(key, None)
            if before is not None:
                self._bytes -= before[1].nbytes
            self._tables[key] = token, table
            self._bytes += table.nbytes
            while self._bytes > self.limit_bytes:
                _, (_, oldest) = self._tables.popitem(last=False)
                self._bytes -= oldest.nbytes


_CACHE = _Cache(CACHE_BYTES)


class Journal(Generic[T]):
    """The journals of one stage, one per key.

    Args:
      stage: Distinguishes stages that keep tables in one process.
      derive: Makes the table from all pages of a journal.
    """

    def __init__(self, stage: str, derive: Callable[[Iterable[bytes]], T]) -> None:
        self.stage = stage
        self.derive = derive
        self._open: dict[Any, tuple[bytes, T]] = {}
        self._changed: set[Any] = set()

    def start_bundle(self) -> None:
        """Forget what an abandoned bundle had open."""
        self._open.clear()
        self._changed.clear()

    def table(self, key: Any, pages: Any, token: Any) -> T:
        """Return the key's table, to be read, or changed along with `append`.

        Args:
          key: The key being processed.
          pages: Its bag states of bytes.
          token: Its read-modify-write state of bytes.
        """
        if key not in self._open:
            committed = token.read()
            cached = _CACHE.take((self.stage, key))
            if committed is None:
                self._open[key] = b"", self.derive(())
            elif cached is not None and cached[0] == committed:
                self._open[key] = cached
            else:
                self._open[key] = (
                    committed,
                    self.derive(chain.from_iterable(bag.read() for bag in pages)),
                )
        return self._open[key][1]

    def append(self, key: Any, page: bytes, pages: Any, token: Any) -> None:
        """Add a page; the caller brings the table up to date."""
        if key not in self._changed:  # all of a bundle is committed at once: one token will do
            self._changed.add(key)
            fresh = os.urandom(16)
            token.write(fresh)
            self._open[key] = fresh, self._open[key][1]
        drawn = self._open[key][0]
        pages[drawn[0] % len(pages)].add(page)  # any bag will do, and one is committed sooner

    def clear(self, key: Any, pages: Any, token: Any) -> None:
        """Drop a journal for good; the key may start a new one."""
        for bag in pages:
            bag.clear()
        token.clear()
        self._open.pop(key, None)
        self._changed.discard(key)
        _CACHE.take((self.stage, key))

    def finish_bundle(self) -> None:
        """Leave the tables for the next bundle, should this one be committed."""
        for key, (token, table) in self._open.items():
            if token:
                _CACHE.leave((self.stage, key), token, table)
        self._open.clear()
        self._changed.clear()
