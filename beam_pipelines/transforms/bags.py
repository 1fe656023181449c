"""Many bags of state as one parameter of a DoFn's method.

What a runner is asked for comes in one answer, so no bag may grow large: 16 MB is much. State
that is larger is spread over several bags, of which Beam wants to see each as a parameter.
"""

import inspect
import uuid
from collections.abc import Callable, Hashable, Sequence
from functools import wraps
from typing import Any

import apache_beam as beam
from apache_beam.transforms.userstate import StateSpec

_ADDED: dict[tuple[str, Hashable], int] = {}


class AddedBytes:
    """How many bytes this process has added to the bags of each key, since it was told zero.

    A hint of when to empty them: to know it exactly would be one more change of state with
    every page. It begins at zero in a new process, and knows nothing of what others added.
    """

    def __init__(self) -> None:
        self._stage = uuid.uuid4().hex

    def add(self, key: Hashable, size_bytes: int) -> int:
        """Count bytes; returns how many there are."""
        added = _ADDED[self._stage, key] = _ADDED.get((self._stage, key), 0) + size_bytes
        return added

    def emptied(self, key: Hashable) -> None:
        """Begin at zero."""
        _ADDED.pop((self._stage, key), None)


def taking_bags(name: str, specs: Sequence[StateSpec]) -> Callable[[Callable], Callable]:
    """Decorate a DoFn's method so that it gets the bags of `specs` as the tuple `name`."""

    def decorate(method: Callable) -> Callable:
        signature = inspect.signature(method)
        others = [each for other, each in signature.parameters.items() if other != name]
        bags = [
            inspect.Parameter(
                spec.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=beam.DoFn.StateParam(spec),
            )
            for spec in specs
        ]
        names = [each.name for each in (*others, *bags)]

        @wraps(method)
        def called(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            given[name] = tuple(given.pop(bag.name) for bag in bags)
            return method(**given)

        called.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*others, *bags]
        )
        return called

    return decorate
