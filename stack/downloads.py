"""Releases of the services: from Maven Central and PyPI, checked against `checksums.txt`."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from stack.java import maven
from stack.settings import REPOSITORY, Settings, StackError

CHECKSUMS = Path(__file__).with_name("checksums.txt")
_DOWNLOADED = ("kafka", "postgres", "cassandra", "flink")

JOB_SERVER = "job-server"
"""What the locked sums of its dependencies begin with."""

JOB_SERVER_POM = REPOSITORY / "runners/flink/pom.xml"

# What the source archive of apache-flink-libraries wants to be looked at with: pip does
# that before it hands over any archive. Newer ones refuse its setup.cfg.
_BUILD_CONSTRAINTS = "setuptools==69.5.1\nwheel==0.45.1\n"


def locked() -> dict[str, str]:
    """Return the SHA-256 of every file that may be downloaded, by `service/file`."""
    lines = CHECKSUMS.read_text().splitlines() if CHECKSUMS.exists() else []
    return {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}


def verify(folder: Path, service: str, lock: Mapping[str, str]) -> None:
    """Compare all files of a folder with the locked sums of a service.

    Raises:
      StackError: a file is missing, not locked, or another one; it is named.
    """
    expected = {name: sha for name, sha in lock.items() if name.startswith(f"{service}/")}
    found = {f"{service}/{path.name}": path for path in folder.iterdir()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise StackError(f"{name} is in {CHECKSUMS}, but was not among the downloads")
        if name not in expected:
            raise StackError(
                f"{name} was downloaded, but {CHECKSUMS} doesn't know it; if versions.toml "
                "was changed, look at what changed and run `python -m stack lock`"
            )
        digest = sha256(found[name])
        if digest != expected[name]:
            raise StackError(
                f"{name} has SHA-256 {digest}, expected {expected[name]}; it is not the "
                "released file: remove it from ~/.m2 and the proxies between, or find out why"
            )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def release(service: str, settings: Settings) -> Path:
    """Return the folder of a service's release; it is downloaded the first time.

    Raises:
      StackError: the download failed, or isn't what `checksums.txt` says.
    """
    part = settings.of(service)
    source = hashlib.sha256(_source(part).encode()).hexdigest()[:8]
    target = settings.cache / f"{service}-{part['version']}-{source}"
    if not target.exists():
        lock = locked()
        with _temporary(settings.cache) as folder:
            _download(part, folder / "files", settings)
            verify(folder / "files", service, lock)
            unpacked = folder / "unpacked"
            _UNPACK.get(service, shutil.move)(folder / "files", unpacked)
            try:
                unpacked.rename(target)
            except OSError:
                if not target.exists():  # else somebody else was faster
                    raise
    return target


def job_server_parts(settings: Settings) -> None:
    """Make sure that the jars which the job server is made of are those that are locked.

    Raises:
      StackError: the download failed, or isn't what `checksums.txt` says.
    """
    with _temporary(settings.cache) as folder:
        _download_job_server_parts(folder / "files", settings)
        verify(folder / "files", JOB_SERVER, locked())


def lock(settings: Settings) -> None:
    """Download everything afresh and write `checksums.txt`."""
    sums = {}
    with _temporary(settings.cache) as folder:
        _download_job_server_parts(folder / "files", settings)
        for path in (folder / "files").iterdir():
            sums[f"{JOB_SERVER}/{path.name}"] = sha256(path)
    for service in _DOWNLOADED:
        with _temporary(settings.cache) as folder:
            _download(settings.of(service), folder / "files", settings)
            for path in (folder / "files").iterdir():
                sums[f"{service}/{path.name}"] = sha256(path)
    CHECKSUMS.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


def pom(coordinates: Iterable[str]) -> str:
    """Return a Maven project that depends on `group:artifact:version`s."""
    dependencies = "".join(
        "<dependency><groupId>{}</groupId><artifactId>{}</artifactId>"
        "<version>{}</version></dependency>\n".format(*each.split(":"))
        for each in coordinates
    )
    return (
        '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>\n'
        "<groupId>stack</groupId><artifactId>release</artifactId><version>1</version>"
        f"<packaging>pom</packaging>\n<dependencies>\n{dependencies}</dependencies></project>\n"
    )


def _source(part: Mapping[str, Any]) -> str:
    return part.get("pip") or " ".join(part["maven"])


def _download(part: Mapping[str, Any], files: Path, settings: Settings) -> None:
    files.mkdir()
    if "pip" in part:
        constraints = files.with_name("constraints.txt")
        constraints.write_text(_BUILD_CONSTRAINTS)
        # The first name is read by pip before 25.3, the second since.
        environment = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), str(constraints))
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        run(
            [*pip, "--no-deps", "--no-binary", ":all:", "--dest", str(files), part["pip"]],
            what=f"downloading {part['pip']}",
            environment=environment,
        )
    else:
        project = files.with_name("pom.xml")
        project.write_text(pom(part["maven"]))
        plugin = settings.of("maven")["dependency-plugin"]
        run(
            [
                *(maven(), "-B", "-q", "-f", str(project), f"{plugin}:copy-dependencies"),
                *("-DincludeScope=runtime", f"-DoutputDirectory={files}"),
            ],
            what=f"downloading {_source(part)}",
        )


def _download_job_server_parts(files: Path, settings: Settings) -> None:
    files.mkdir()
    plugin = settings.of("maven")["dependency-plugin"]
    run(
        [
            *(maven(), "-B", "-q", "-f", str(JOB_SERVER_POM), f"{plugin}:copy-dependencies"),
            # Two groups may have files of one name.
            *("-DincludeScope=runtime", "-Dmdep.prependGroupId=true"),
            f"-DoutputDirectory={files}",
        ],
        what="downloading what the job server is made of",
    )


def run(command: list[str], what: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a command to its end and return its standard output.

    Raises:
      StackError: it failed; the message has the end of what it wrote.
    """
    done = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        tail = "\n  ".join(done.stdout.splitlines()[-20:])
        raise StackError(f"{what} failed: {command[0]} ended with {done.returncode}\n  {tail}")
    return done.stdout


def _unpack_postgres(files: Path, target: Path) -> None:
    """Keep an archive per processor: the jars hold one each."""
    for jar in files.glob("*.jar"):
        shutil.unpack_archive(jar, target, "zip")
    shutil.rmtree(target / "META-INF")
    for archive in target.glob("*.txz"):
        folder = target / archive.stem.rpartition("-")[2]  # x86_64, arm_64
        _untar(archive, folder)
        archive.unlink()


def _unpack_flink(files: Path, target: Path) -> None:
    (archive,) = files.glob("*.tar.gz")
    _untar(archive, files)
    (root,) = (path for path in files.iterdir() if path.is_dir())
    (root / "deps").rename(target)
    # A cluster loads everything under plugins/: the local configuration names none.
    for plugin in (target / "plugins").iterdir():
        if plugin.is_dir():
            shutil.rmtree(plugin)


_UNPACK: Mapping[str, Callable[[Path, Path], object]] = {
    "postgres": _unpack_postgres,
    "flink": _unpack_flink,
}


def _untar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        # Early releases of Python 3.11 have no filters.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        tar.extractall(folder)


class _temporary(tempfile.TemporaryDirectory):  # noqa: N801 (used as a function)
    """A folder beside the releases: renaming works within one file system only."""

    def __init__(self, cache: Path) -> None:
        cache.mkdir(parents=True, exist_ok=True)
        super().__init__(dir=cache, prefix=".download-")

    def __enter__(self) -> Path:
        return Path(super().__enter__())
