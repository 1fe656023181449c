"""What programs print: text that can't steer a terminal, and ends without a traceback."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

_EXTRAS = {"cassandra": "cassandra", "confluent_kafka": "kafka", "psycopg": "postgres"}


def printable(text: object, keep: str = "") -> str:
    r"""Return a text as a terminal may show it: what isn't printable is escaped.

    That is control characters (C0, DEL, C1), those that turn the writing direction, lone
    halves of surrogate pairs, and all else that Unicode calls no graphic character, but not
    the space. Texts without such characters, printed ones among them, stay as they are.

    Args:
      text: Anything; `str` makes a text of it.
      keep: Characters to leave alone, such as a newline.

    Example:
      >>> printable("/\x1b[2J\u202e")
      '/\\x1b[2J\\u202e'
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in shown)


def _escaped(character: str) -> str:
    return repr(character)[1:-1]  # Python's own escapes: repr goes by isprintable, too


def say(text: object) -> None:
    """Print one line to stderr."""
    print(printable(text), file=sys.stderr)


def told(error: BaseException) -> str:
    """Return what an error says, in one line; of the operating system's: the path and why."""
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def missing_extra(error: ImportError) -> str | None:
    """Say which extra of the package an import lacks; None: none of them, so it is a bug."""
    module = (error.name or "").partition(".")[0]
    if module not in _EXTRAS:
        return None
    return (
        f"{module} isn't installed, and this needs it: "
        f"pip install 'beam-pipelines[{_EXTRAS[module]}]'"
    )


def run_command(main: Callable[[], int]) -> int:
    """Run a program's `main` and return its exit code, whatever ends it early.

    What is no fault of the program takes one line on stderr: Ctrl-C (130), stdout that
    nobody reads any more, such as `… | head`, and files or servers that can't be used (1), a
    missing extra (2). Any other exception passes.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup, say
        signal.signal(signal.SIGINT, _interrupt)
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        say("stopped by Ctrl-C")
        return INTERRUPTED
    except BrokenPipeError:
        # Else Python flushes what is left when it exits, and fails again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        say("not all was printed: what read the output has closed it")
        return 1
    except ImportError as error:
        if (missing := missing_extra(error)) is None:
            raise
        say(missing)
        return 2
    except OSError as error:
        say(told(error))
        return 1


@contextmanager
def interrupted_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process at once, during a block that would take it for a failure.

    Beam turns the exception into one of the step that it hits, and logs that. Only in a
    program that `run_command` runs: other callers of its `main` get the exception.
    """
    if signal.getsignal(signal.SIGINT) is not _interrupt:
        yield
        return
    signal.signal(signal.SIGINT, _exit_interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def _exit_interrupted(*_: Any) -> NoReturn:
    if sys.stderr.isatty():
        print(file=sys.stderr)  # the line that shows progress stays
    say("stopped by Ctrl-C: what was written so far is no result; run it again")
    os._exit(INTERRUPTED)
