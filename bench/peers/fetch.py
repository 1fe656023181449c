"""What the peers are made of, in the cache of `stack`: from Maven Central and PyPI."""

import shutil
import sys
from pathlib import Path

from stack import Settings
from stack.downloads import pom, run
from stack.java import maven


def jars(coordinate: str, settings: Settings, alone: bool = False) -> Path:
    """Return the folder of a `group:artifact:version` and, unless alone, all it needs."""
    folder = settings.cache / "-".join(coordinate.split(":")[1:])
    if not folder.exists():
        partial = _emptied(folder)
        (partial / "pom.xml").write_text(pom([coordinate]))
        plugin = settings.of("maven")["dependency-plugin"]
        run(
            [
                *(maven(), "-B", "-q", "-f", str(partial / "pom.xml")),
                *(f"{plugin}:copy-dependencies", "-DincludeScope=runtime"),
                f"-DexcludeTransitive={'true' if alone else 'false'}",
                f"-DoutputDirectory={partial}",
            ],
            what=f"downloading {coordinate}",
        )
        partial.rename(folder)
    return folder


def environment(requirement: str, settings: Settings) -> Path:
    """Return the Python of an environment that has one package, and what it needs."""
    folder = settings.cache / requirement.replace("==", "-")
    ready = folder / "ready"
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        run([sys.executable, "-m", "venv", str(folder)], what=f"making {folder}")
        pip = (str(folder / "bin/python"), "-m", "pip", "install", "--quiet", requirement)
        run([*pip], what=f"installing {requirement}")
        ready.touch()
    return folder / "bin/python"


def _emptied(folder: Path) -> Path:
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial
