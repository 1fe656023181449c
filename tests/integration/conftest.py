"""One platform for all integration tests; each service starts when a test asks for it first."""

import os

import pytest

from stack import Stack

PORT_OFFSET = int(os.environ.get("STACK_PORT_OFFSET") or 1000)
"""Beside the platform that somebody may be using."""


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """Return the platform, of which nothing runs by itself.

    A release that can't be had is an error of the tests, never a reason to skip them.
    """
    stack = Stack(home=tmp_path_factory.mktemp("stack"), port_offset=PORT_OFFSET, small=True)
    try:
        yield stack
    finally:
        stack.down()


@pytest.fixture(scope="session")
def kafka(stack):
    """Return HOST:PORT of a broker."""
    stack.up("kafka")
    return stack.settings.environment()["KAFKA_BOOTSTRAP_SERVERS"]


@pytest.fixture(scope="session")
def postgres(stack):
    """Return the URL of a database with the tables of the repository."""
    stack.up("postgres")
    return stack.settings.environment()["ACTIVITY_DATABASE_URL"]


@pytest.fixture(scope="session")
def cassandra(stack):
    """Return HOST:PORT/KEYSPACE of a node with the tables of the repository."""
    stack.up("cassandra")
    return stack.settings.environment()["CASSANDRA"]


@pytest.fixture(scope="session")
def cluster(stack, kafka, postgres, cassandra):
    """Return the whole platform, with Flink and a pool of workers."""
    stack.up()
    return stack
