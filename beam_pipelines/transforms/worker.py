"""How a process of Beam's worker is set, for batches of columns and state of bytes.

The worker keeps state that was read, and weighs each value whenever it puts it there. Beam does
that by `objsize`, which first lists the globals of all loaded modules, to leave them out:
0.36 ms a value, and 11 % of all the time in which Python had the GIL, for a job that reads
20,000 events/s from 32 partitions. State of ours is bytes and numbers, which refer to no
module.

Python's garbage collector looks at the youngest objects once 700 more were made than freed. A
batch that becomes records makes tens of thousands, none of which is garbage.
"""

import gc
from typing import Any

from apache_beam.runners.worker import statecache

YOUNG_OBJECTS = 50_000
"""New objects after which the collector looks at them."""


def tune_worker() -> None:
    """Set this process; for `DoFn.setup`.

    State is weighed without regard to modules' globals. That holds for all that the process
    caches: what refers to a module's global, which no state here does, weighs more than before.
    """
    statecache.get_deep_size = _deep_size
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])


def _deep_size(*objects: Any) -> int:
    size: int = statecache.objsize.get_deep_size(
        *objects,
        get_size_func=statecache._size_func,
        get_referents_func=statecache._get_referents_func,
        filter_func=statecache._filter_func,
        exclude_modules_globals=False,
    )
    return size
