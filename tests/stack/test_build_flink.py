"""When the job server is built, and when the one that is there will do."""

import os

import pytest

from stack import Stack, StackError
from stack import __main__ as command


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of a pom, a source and a jar, of age 1, 2 and 3; what is run is listed."""
    for age, name in enumerate(
        ("pom.xml", "src/main/java/org/Some.java", "target/beam-flink-job-server.jar"), start=1
    ):
        path = tmp_path / "runners/flink" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (age, age))
    ran = []
    monkeypatch.setattr(command, "REPOSITORY", tmp_path)
    monkeypatch.setattr(command.java, "java", lambda: "java")
    monkeypatch.setattr(command.java, "maven", lambda: "mvn")
    monkeypatch.setattr(command.downloads, "job_server_parts", lambda settings: ran.append("sums"))
    monkeypatch.setattr(command.downloads, "run", lambda argv, what: ran.append(argv))
    return tmp_path / "runners/flink", ran


def test_a_job_server_that_is_younger_than_its_sources_stays(repository, capsys):
    command._build_flink(Stack(), None)
    assert repository[1] == []
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pom.xml", "src/main/java/org/Some.java"])
def test_it_is_built_anew_when_a_source_has_changed(repository, name):
    folder, ran = repository
    os.utime(folder / name, (4, 4))
    command._build_flink(Stack(), None)
    assert ran == ["sums", ["mvn", "-B", "-q", "-f", str(folder / "pom.xml"), "package"]]


def test_it_is_built_where_there_is_none(repository):
    folder, ran = repository
    (folder / "target/beam-flink-job-server.jar").unlink()
    command._build_flink(Stack(), None)
    assert len(ran) == 2


def test_it_is_not_built_of_jars_that_are_not_those_that_are_locked(repository, monkeypatch):
    folder, ran = repository

    def refuse(settings):
        raise StackError("a.jar has SHA-256 0, expected 1")

    monkeypatch.setattr(command.downloads, "job_server_parts", refuse)
    (folder / "target/beam-flink-job-server.jar").unlink()
    with pytest.raises(StackError, match="expected 1"):
        command._build_flink(Stack(), None)
    assert ran == []
