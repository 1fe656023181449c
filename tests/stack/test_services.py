import os
import socket
import sys

import pytest

from stack import Stack, StackError
from stack.__main__ import main
from stack.cassandra import node_yaml, statements
from stack.flink import CONF, JobManager, TaskManager, flat_yaml
from stack.flink import local as local_configuration
from stack.kafka import broker_properties
from stack.service import Service
from stack.settings import HOST, Settings


class Echo(Service):
    """A service made of a few lines of Python."""

    name = "echo"
    start_timeout_s = 20
    program = (
        "import socket, sys\n"
        "server = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
        "print('listening', flush=True)\n"
        "while True: server.accept()[0].close()\n"
    )

    def __init__(self, settings, port):
        super().__init__(settings)
        self._port = port
        self.furnished = 0

    @property
    def ports(self):
        return {"echo": self._port}

    def fetch(self):
        pass

    def prepare(self):
        return [sys.executable, "-c", self.program, str(self._port)]

    def answers(self):
        with socket.create_connection((HOST, self._port), timeout=5):
            return True

    def furnish(self):
        self.furnished += 1


@pytest.fixture
def settings(tmp_path):
    return Settings(home=tmp_path, cache=tmp_path / "cache")


@pytest.fixture
def echo(settings):
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
    service = Echo(settings, port)
    yield service
    service.down()


def test_a_service_comes_and_goes(echo):
    assert echo.pid is None and not echo.healthy
    assert echo.up().startswith("started in ")
    pid = echo.pid
    assert echo.healthy and echo.furnished == 1
    assert echo.tail() == "listening"
    assert echo.up() == "runs already"
    assert echo.pid == pid and echo.furnished == 2
    assert echo.down().startswith("stopped in ")
    assert echo.pid is None and not echo.healthy
    assert echo.down() == "was not running"


def test_a_killed_service_is_seen_to_be_dead_and_starts_again(echo):
    echo.up()
    pid = echo.pid
    echo.kill()
    assert echo.pid is None and echo.process.pid == pid
    echo.up()
    assert echo.healthy and echo.pid != pid
    assert (echo.folder / "log.1").read_text() == "listening\n"


def test_what_does_not_run_cannot_be_killed(echo):
    with pytest.raises(StackError, match="echo can't be killed: it does not run"):
        echo.kill()


def test_a_service_that_ends_at_once_shows_its_log(echo):
    echo.program = "raise SystemExit('no room\\nleft')"
    with pytest.raises(StackError) as raised:
        echo.up()
    assert str(raised.value) == (
        f"echo ended while starting; the end of {echo.log}:\n  no room\n  left"
    )


def test_a_service_that_gives_no_answer_is_given_up(echo):
    echo.program = "import signal; signal.pause()"
    echo.start_timeout_s = 0.3
    with pytest.raises(StackError, match="echo gave no answer within 0 s; the end of "):
        echo.up()


def test_a_set_up_that_fails_is_told_with_its_cause(echo):
    def furnish():
        raise RuntimeError("no such privilege")

    echo.furnish = furnish
    with pytest.raises(StackError, match=r"refused its set-up \(no such privilege\)"):
        echo.up()


def test_a_port_that_is_taken_is_named(echo):
    with (
        socket.create_server((HOST, echo.ports["echo"])),
        pytest.raises(StackError, match=rf"echo needs port {echo.ports['echo']} \(echo\)"),
    ):
        echo.up()
    assert echo.process is None


def test_names_are_told_in_the_order_of_starting(tmp_path):
    stack = Stack(home=tmp_path)
    assert [each.name for each in stack.services()] == [
        "kafka",
        "postgres",
        "cassandra",
        "flink-jobmanager",
        "flink-taskmanager",
        "workers",
    ]
    assert [each.name for each in stack.services(["workers", "flink"])] == [
        "flink-jobmanager",
        "flink-taskmanager",
        "workers",
    ]


def test_an_unknown_service_is_refused(tmp_path):
    with pytest.raises(StackError, match="there is no service 'redis'; there are kafka, postgres"):
        Stack(home=tmp_path).up("redis")


def test_clean_removes_what_services_left_and_nothing_else(tmp_path):
    for name in ("kafka/data", "flink/checkpoints", "lake/topic", "mine"):
        (tmp_path / name).mkdir(parents=True)
    Stack(home=tmp_path).clean("kafka")
    assert sorted(os.listdir(tmp_path)) == ["flink", "lake", "lock", "mine"]
    Stack(home=tmp_path).clean()
    assert sorted(os.listdir(tmp_path)) == ["lock", "mine"]


def test_the_command_says_that_nothing_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STACK_HOME", str(tmp_path))
    assert main(["status", "kafka", "workers"]) == 1
    assert capsys.readouterr().out == "kafka              stopped\nworkers            stopped\n"
    assert main(["logs"]) == 2
    assert (
        capsys.readouterr().err == f"stack: there are no logs in {tmp_path}; nothing was started\n"
    )


def test_a_taskmanager_is_configured_like_production_but_for_its_place(settings):
    production = flat_yaml((CONF / "config.yaml").read_text())
    manager = TaskManager(settings)
    manager.folder.mkdir()
    local = {**local_configuration(production), **manager.overrides()}
    assert local["taskmanager.resource-id"].startswith("taskmanager-")
    assert local["rest.port"] == "28081"
    assert local["state.checkpoints.dir"] == f"file://{settings.home}/flink/checkpoints"
    kept = (
        "state.backend.type",
        "state.backend.incremental",
        "resourcemanager.standalone.start-up-time",
        "restart-strategy.type",
    )
    assert [local[key] for key in kept] == [
        "rocksdb",
        "true",
        "0",
        "exponential-delay",
    ]


def test_no_reporter_listens_here_as_it_would_on_all_interfaces(settings):
    production = flat_yaml((CONF / "config.yaml").read_text())
    left_out = production.keys() - local_configuration(production).keys()
    assert left_out == {key for key in production if key.startswith("metrics.reporter.")} != set()
    assert not any("reporter" in key for key in JobManager(settings).overrides())


def test_the_default_memory_is_that_of_production(settings):
    production = flat_yaml((CONF / "config.yaml").read_text())
    in_mib = {"5g": "5120m", "1g": "1024m"}
    for key, value in JobManager(settings).overrides().items():
        if ".memory." in key:
            assert value == in_mib.get(production[key], production[key]), key


def test_every_override_is_of_a_setting_that_production_has(settings):
    production = flat_yaml((CONF / "config.yaml").read_text())
    only_here = {"taskmanager.host", "io.tmp.dirs", "metrics.fetcher.update-interval"}
    assert JobManager(settings).overrides().keys() - production.keys() == only_here


@pytest.mark.parametrize("text", ["a: 1\na: 2", "a:\n  b: 1", "no colon", "  a: 1"])
def test_a_configuration_that_is_not_flat_is_refused(text):
    with pytest.raises(ValueError, match=r"is not one more `key: value`"):
        flat_yaml(text)


def test_a_value_may_hold_colons_and_spaces():
    assert flat_yaml("# c\n\na: file:///x  \nb: -D x: y\n") == {"a": "file:///x", "b": "-D x: y"}


def test_the_broker_listens_at_home_only(tmp_path):
    properties = dict(
        line.split("=", 1)
        for line in broker_properties({"broker": 1, "controller": 2}, tmp_path).splitlines()
        if not line.startswith("#")
    )
    assert properties["listeners"] == "PLAINTEXT://127.0.0.1:1,CONTROLLER://127.0.0.1:2"
    assert properties["controller.quorum.voters"] == "1@127.0.0.1:2"
    assert properties["log.dirs"] == str(tmp_path)


def test_the_node_listens_at_home_only_and_loses_no_acknowledged_write(tmp_path):
    node = node_yaml({"native": 1, "storage": 2, "ssl_storage": 3}, tmp_path, 512).splitlines()
    assert {"rpc_address: 127.0.0.1", "listen_address: 127.0.0.1"} <= set(node)
    assert {"native_transport_port: 1", "storage_port: 2", "commitlog_sync: batch"} <= set(node)


def test_cql_is_split_at_its_semicolons():
    assert statements("-- a; b\nCREATE x;\n\n  // c;\nCREATE\n y ;\n") == ["CREATE x", "CREATE\n y"]
