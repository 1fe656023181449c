"""Many bags of state as one parameter of a DoFn's method.

What a runner is asked for comes in one answer, so no bag may grow large: 16 MB is much. State
that is larger is spread over several bags, of which Beam wants to see each as a parameter.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import apache_beam as beam
from apache_beam.transforms.userstate import StateSpec


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
