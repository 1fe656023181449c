"""Where the time goes: `python -m bench.profile core`, or `whole`.

A thread looks at what the others do, some hundred times a second, and puts each look down
to the innermost function of ours on the stack. What runs below it (NumPy, Arrow, a coder
that Beam calls) counts as its own; what has none of ours is Beam's. The thread only gets
its turn where the interpreter lock is free, so lines that hold it long are seen at their
end, and the one after them may look dearer than it is.
"""

import argparse
import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import beam_pipelines
from beam_pipelines.demo import DemoTraffic
from bench import pipelines
from bench.child import run_whole
from bench.measure import timed, use_one_core

PERIOD_S = 0.002
_OURS = f"{Path(beam_pipelines.__file__).parent}{os.sep}"
_NOT_STAGES = ("model", "kernels", "telemetry")  # what stages are made of
_WAITING = ("threading.py", "queue.py", "selectors.py", "concurrent")


class Profile:
    """A context manager that samples all other threads while it is open."""

    def __init__(self) -> None:
        self.stages: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="profile", daemon=True)

    def __enter__(self) -> "Profile":
        self._before_s = sys.getswitchinterval()
        sys.setswitchinterval(PERIOD_S / 4)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()
        sys.setswitchinterval(self._before_s)

    def _run(self) -> None:
        own = threading.get_ident()
        while not self._left.wait(PERIOD_S):
            for thread, frame in sys._current_frames().items():
                if thread != own and not _is_waiting(frame):
                    self.add(frame)

    def add(self, innermost: FrameType) -> None:
        """Count one look at a stack."""
        ours = [frame for frame in _stack(innermost) if _file(frame).startswith(_OURS)]
        if not ours:
            place = f"Beam: {Path(_file(innermost)).name} {innermost.f_code.co_name}"
            self.stages["Beam"] += 1
            self.lines[place] += 1
            return
        stages = [frame for frame in ours if _layer(frame) not in _NOT_STAGES]
        self.stages[_place(stages[0] if stages else ours[-1])] += 1
        self.lines[f"{_place(ours[0])}:{ours[0].f_lineno}"] += 1


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename


def _layer(frame: FrameType) -> str:
    return _file(frame).removeprefix(_OURS).split(os.sep)[0].removesuffix(".py")


def _place(frame: FrameType) -> str:
    return f"{_file(frame).removeprefix(_OURS)} {frame.f_code.co_qualname}"


def _is_waiting(frame: FrameType) -> bool:
    return any(name in _file(frame) for name in _WAITING)


def shares(counted: Counter[str], most: int) -> Iterator[str]:
    """Return the largest counts as lines, in percent of all."""
    total = sum(counted.values())
    for name, count in counted.most_common(most):
        yield f"{100 * count / total:6.1f} %  {name}"


def main() -> None:
    """Profile what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile")
    parser.add_argument("what", choices=("core", "whole"))
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args()
    use_one_core()
    with TemporaryDirectory() as folder:
        if flags.what == "core":
            pipelines.hold(DemoTraffic(flags.events, flags.seed))
            run: Callable[[], object] = pipelines.run_core
        else:
            demo = (f"--demo_events={flags.events}", f"--seed={flags.seed}")
            run = partial(run_whole, folder, *demo)
        with Profile() as profile, contextlib.redirect_stdout(sys.stderr):
            seconds = timed(run)
    looks = sum(profile.stages.values())
    print(f"{flags.what}: {flags.events:,} events, {seconds:.1f} s, seen {looks:,} times\n")
    print("by stage", *shares(profile.stages, 20), "", sep="\n")
    print("by line", *shares(profile.lines, 40), sep="\n")


if __name__ == "__main__":
    main()
