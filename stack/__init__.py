"""The platform the pipelines run on, as plain processes on a machine without Docker.

Kafka, Postgres, Cassandra, Flink and Beam's worker pool, each started from its own
release, under one folder, on ports of its own, bound to 127.0.0.1. `python -m stack up`
from the shell; from Python:

    stack = Stack(home=tmp_path, port_offset=1000)
    stack.up("kafka")
    stack.kill("kafka")  # as a crash would
    stack.down()
"""

from stack.services import Stack
from stack.settings import Settings, StackError

__all__ = ["Settings", "Stack", "StackError"]
