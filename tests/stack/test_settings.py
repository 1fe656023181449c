import subprocess
import tomllib
from pathlib import Path

import pytest

from stack.settings import REPOSITORY, Settings, StackError, versions


def settings(**given):
    return Settings(home=Path("/h"), cache=Path("/c"), **given)


def test_addresses_are_those_of_the_versions_file():
    assert settings().environment() == {
        "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:29092",
        "ACTIVITY_DATABASE_URL": "postgresql://activity:activity@127.0.0.1:25432/activity",
        "CASSANDRA": "127.0.0.1:29042/activity",
        "FLINK_MASTER": "127.0.0.1:28081",
        "BEAM_WORKER_POOL": "127.0.0.1:25000",
        "LAKE": "/h/lake",
    }


def test_an_offset_moves_every_port():
    moved = settings(port_offset=1000)
    for part, values in versions().items():
        for name, port in values.get("ports", {}).items():
            assert moved.port(part, name) == port + 1000
    assert moved.environment()["FLINK_MASTER"] == "127.0.0.1:29081"


def test_no_two_services_share_a_port():
    ports = [port for part in versions().values() for port in part.get("ports", {}).values()]
    assert len(ports) == len(set(ports)) == 9


@pytest.mark.parametrize("offset", [-23977, 3675])
def test_an_offset_that_leaves_the_range_of_ports_is_refused(offset):
    with pytest.raises(StackError, match=r"choose one between -23976 and 3674"):
        settings(port_offset=offset)


def test_an_offset_that_is_no_number_is_refused():
    with pytest.raises(StackError, match=r"STACK_PORT_OFFSET='many' is not a whole number"):
        Settings.of_environment({"STACK_PORT_OFFSET": "many"})


def test_the_environment_says_where_a_platform_lives():
    assert Settings.of_environment(
        {
            "STACK_HOME": "/a/b",
            "STACK_CACHE": "/c",
            "STACK_PORT_OFFSET": "7",
            "STACK_SMALL": "1",
            "POSTGRES_PASSWORD": "p",
        }
    ) == Settings(Path("/a/b"), Path("/c"), port_offset=7, small=True, postgres_password="p")


def test_empty_variables_mean_the_defaults():
    names = "STACK_HOME STACK_CACHE STACK_PORT_OFFSET STACK_SMALL POSTGRES_PASSWORD".split()
    assert Settings.of_environment(dict.fromkeys(names, "")) == Settings.of_environment({})
    assert Settings.of_environment({}).home == REPOSITORY / ".stack"


def test_the_small_profile_takes_less_memory_and_changes_nothing_else():
    for part in ("kafka", "postgres", "cassandra", "flink"):
        usual, small = settings().of(part), settings(small=True).of(part)
        smaller = {name for name in usual if small[name] != usual[name]}
        assert smaller and all(name.endswith("_mb") for name in smaller)
        assert all(small[name] < usual[name] for name in smaller)
        assert usual.keys() == small.keys()


def test_exports_survive_the_shell_with_any_password():
    password = "a'b $c;/@:%"
    lines = settings(postgres_password=password).exports()
    shown = subprocess.run(
        ["sh", "-c", f'{lines}\nprintf %s "$ACTIVITY_DATABASE_URL"'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown == "postgresql://activity:a%27b%20%24c%3B%2F%40%3A%25@127.0.0.1:25432/activity"


def test_releases_are_of_the_versions_they_are_named_by():
    parts = tomllib.loads((REPOSITORY / "stack/versions.toml").read_text())
    assert parts["kafka"]["maven"][0].endswith(f":{parts['kafka']['version']}")
    assert parts["cassandra"]["maven"][0].endswith(f":{parts['cassandra']['version']}")
    assert parts["flink"]["pip"].endswith(f"=={parts['flink']['version']}")
    for binaries in parts["postgres"]["maven"]:
        assert binaries.endswith(f":{parts['postgres']['version']}.0")
