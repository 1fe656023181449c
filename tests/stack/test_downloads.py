import hashlib
import os
import re
import subprocess
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from stack import downloads
from stack.settings import REPOSITORY, Settings, StackError

JAR = hashlib.sha256(b"jar").hexdigest()


@pytest.fixture
def settings(tmp_path):
    return Settings(home=tmp_path / "home", cache=tmp_path / "cache")


@pytest.fixture
def offered(monkeypatch):
    """Stand in for the registries: the files that a download brings, and how often."""
    files = {"a.jar": b"jar"}

    def download(part, folder, settings):
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        download.times += 1

    download.files, download.times = files, 0
    monkeypatch.setattr(downloads, "_download", download)
    monkeypatch.setattr(downloads, "locked", lambda: {"kafka/a.jar": JAR, "flink/b": "0"})
    return download


def test_a_release_is_downloaded_once(settings, offered):
    folder = downloads.release("kafka", settings)
    assert folder.parent == settings.cache and folder.name.startswith("kafka-4.3.1-")
    assert [path.name for path in folder.iterdir()] == ["a.jar"]
    assert downloads.release("kafka", settings) == folder
    assert offered.times == 1
    assert list(settings.cache.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jar": b"JAR"}, r"^kafka/a\.jar has SHA-256 [0-9a-f]{64}, expected " + JAR),
        ({"a.jar": b"jar", "z.jar": b""}, r"^kafka/z\.jar was downloaded, but .* doesn't know it"),
        ({}, r"^kafka/a\.jar is in .*, but was not among the downloads"),
    ],
)
def test_a_download_that_is_not_what_was_locked_is_refused_by_name(
    settings, offered, files, message
):
    offered.files.clear()
    offered.files.update(files)
    with pytest.raises(StackError, match=message):
        downloads.release("kafka", settings)
    assert list(settings.cache.iterdir()) == []


def test_everything_that_is_downloaded_is_locked():
    services = {name.partition("/")[0] for name in downloads.locked()}
    assert services == {"kafka", "postgres", "cassandra", "flink", "job-server"}
    assert all(len(digest) == 64 for digest in downloads.locked().values())


def test_the_lock_is_of_the_versions_in_use():
    parts = tomllib.loads((REPOSITORY / "stack/versions.toml").read_text())
    for service in ("kafka", "postgres", "cassandra"):
        for coordinates in parts[service]["maven"]:
            _, artifact, version = coordinates.split(":")
            assert f"{service}/{artifact}-{version}.jar" in downloads.locked()
    assert f"flink/{parts['flink']['pip'].replace('==', '-')}.tar.gz" in downloads.locked()


def test_the_job_server_is_made_of_what_is_locked_only(settings, monkeypatch):
    name = "job-server/org.some.a-1.jar"
    jar = b"jar"
    monkeypatch.setattr(downloads, "maven", lambda: "mvn")
    monkeypatch.setattr(downloads, "locked", lambda: {name: JAR, "kafka/a.jar": "0"})

    def copied(command, what):
        (folder,) = [each.split("=")[1] for each in command if "outputDirectory" in each]
        assert command[:5] == ["mvn", "-B", "-q", "-f", str(downloads.JOB_SERVER_POM)]
        Path(folder, name.partition("/")[2]).write_bytes(jar)

    monkeypatch.setattr(downloads, "run", copied)
    downloads.job_server_parts(settings)
    jar = b"JAR"
    with pytest.raises(StackError, match=rf"^{name} has SHA-256 [0-9a-f]{{64}}, expected {JAR}"):
        downloads.job_server_parts(settings)
    assert list(settings.cache.iterdir()) == []


def test_the_lock_has_the_job_server_of_the_pom():
    pom = downloads.JOB_SERVER_POM.read_text()
    version, line = (
        pom.partition(f"<{name}>")[2].partition("<")[0] for name in ("beam.version", "flink.line")
    )
    runner = f"job-server/org.apache.beam.beam-runners-flink-{line}-{version}.jar"
    assert runner in downloads.locked()


def test_the_image_checks_the_sums_before_it_builds_the_job_server(tmp_path):
    """As its Dockerfile does it, with a Maven that only copies."""
    dockerfile = (REPOSITORY / "runners/flink/pipeline.Dockerfile").read_text()
    (script,) = re.findall(r"^RUN (mvn .+? && \\\n.+?package)$", dockerfile, re.M | re.S)
    plugin = Settings(tmp_path, tmp_path).of("maven")["dependency-plugin"]
    assert f" {plugin}:copy-dependencies " in script
    bin_, files = tmp_path / "bin", tmp_path / "target/dependencies"
    bin_.mkdir()
    (bin_ / "mvn").write_text("#!/bin/sh\ncase $* in *package) touch built;; esac\n")
    (bin_ / "mvn").chmod(0o755)
    files.mkdir(parents=True)
    (tmp_path / "checksums.txt").write_text(f"{JAR}  job-server/a.jar\n{'0' * 64}  kafka/b.jar\n")

    def builds(**contents):
        for path in (*files.iterdir(), tmp_path / "built"):
            path.unlink(missing_ok=True)
        for name, content in contents.items():
            (files / f"{name}.jar").write_bytes(content)
        done = subprocess.run(
            ["sh", "-c", script],
            cwd=tmp_path,
            env={"PATH": f"{bin_}:{os.environ['PATH']}"},
            capture_output=True,
        )
        assert (tmp_path / "built").exists() == (done.returncode == 0)
        return done.returncode == 0

    assert builds(a=b"jar")
    assert not builds(a=b"JAR")
    assert not builds()
    assert not builds(a=b"jar", b=b"jar")


def test_a_pom_depends_on_what_it_was_given():
    project = ET.fromstring(downloads.pom(["g:a:1", "h:b:2"]))
    space = "{http://maven.apache.org/POM/4.0.0}"
    assert [
        tuple(part.text for part in dependency) for dependency in project.iter(f"{space}dependency")
    ] == [("g", "a", "1"), ("h", "b", "2")]


def test_a_command_that_fails_shows_the_end_of_its_output():
    with pytest.raises(StackError) as raised:
        downloads.run(["sh", "-c", "seq 30; echo oh >&2; exit 3"], what="counting")
    message = str(raised.value).splitlines()
    assert message[0] == "counting failed: sh ended with 3"
    assert message[1:] == [f"  {n}" for n in (*range(12, 31), "oh")]
