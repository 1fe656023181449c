"""The Java that the services run on, and Maven that fetches them."""

import functools
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from stack.settings import StackError, versions

_INSTALLING = threading.Lock()  # services start at the same time, one installs


@functools.cache
def java() -> str:
    """Return the path of a Java of the right version.

    It is looked for in JAVA_HOME, on the PATH, then where Debian keeps all of them; root
    on Debian and Ubuntu gets it installed.

    Raises:
      StackError: there is none; the message has the line to run.
    """
    wanted = versions()["java"]["version"]
    with _INSTALLING:
        found = _find_java(wanted)
        if not found:
            install_packages(f"Java {wanted}")
            found = _find_java(wanted)
    if not found:
        raise StackError(f"no Java {wanted} was found after its installation; set JAVA_HOME to one")
    return found


def maven() -> str:
    """Return the path of mvn, installed like `java` where it is missing."""
    with _INSTALLING:
        found = shutil.which("mvn")
        if not found:
            install_packages("mvn")
            found = shutil.which("mvn")
    if not found:
        raise StackError("mvn was not found after its installation; put it on the PATH")
    return found


def install_packages(missing: str) -> None:
    """Install the system's packages if that is possible.

    Raises:
      StackError: it isn't, or it failed; the message has the line to run.
    """
    part = versions()["java"]
    packages = " ".join(part["packages"])
    line = f"apt-get update && apt-get install -y --no-install-recommends {packages}"
    if not shutil.which("apt-get"):
        raise StackError(
            f"{missing} is missing; install Maven and a Java {part['version']} runtime"
        )
    if os.geteuid() != 0:
        raise StackError(f"{missing} is missing; run: sudo sh -c '{line}'")
    print(f"{missing} is missing, installing: {packages}", flush=True)
    done = subprocess.run(
        ["sh", "-c", line],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        tail = "\n  ".join(done.stdout.splitlines()[-10:])
        raise StackError(f"{missing} is missing, and `{line}` failed:\n  {tail}")


def _find_java(wanted: int) -> str | None:
    for candidate in _candidates():
        try:
            said = subprocess.run([candidate, "-version"], capture_output=True, text=True).stderr
        except OSError:
            continue
        version = re.search(r'version "(\d+)', said)
        if version and int(version[1]) == wanted:
            return candidate
    return None


def _candidates() -> Iterator[str]:
    if home := os.environ.get("JAVA_HOME"):
        yield f"{home}/bin/java"
    if on_path := shutil.which("java"):
        yield on_path
    yield from sorted(map(str, Path("/usr/lib/jvm").glob("*/bin/java")))
