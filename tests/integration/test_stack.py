"""Where the processes of the local platform listen, and those of a job on it."""

import os
import socket
import threading
from contextlib import contextmanager

import pytest

from tests.faults.run import Run
from tests.integration.sockets import listening, parsed


@contextmanager
def watched(*pids):
    """Look several times a second; yields what was seen so far."""
    seen, over = set(), threading.Event()

    def look():
        while not over.wait(0.2):
            seen.update(listening(pids))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_no_process_of_the_platform_or_of_a_job_listens_beyond_this_machine(cluster, tmp_path):
    run = Run(cluster, "sockets", tmp_path)
    run.prepare()
    services = [service for service in cluster.services() if service.pid]
    leaders = [service.pid for service in services]
    with watched(os.getpid(), *leaders) as seen:  # this one starts the driver, with a job server
        run.submit()
    run.close()
    beyond = [each for each in seen if not each.is_here_only]
    assert sorted(f"{each.address}, {each.port}: {each.command}" for each in beyond) == []
    ports = {each.port for each in seen}
    assert {port for service in services for port in service.ports.values()} <= ports | {
        cluster.settings.port("cassandra", "ssl_storage")  # is kept free, for nobody
    }
    of_services = {each.pid for each in listening(leaders)}
    assert len(of_services) == len(services)
    assert {each.pid for each in seen} - of_services != set()  # the job server


@pytest.mark.parametrize(
    ("family", "address", "here_only"),
    [
        (socket.AF_INET, "127.0.0.1", True),
        (socket.AF_INET, "127.9.9.9", True),
        (socket.AF_INET, "0.0.0.0", False),
        (socket.AF_INET6, "::", False),
        (socket.AF_INET6, "::1", True),
        (socket.AF_INET6, "::ffff:127.0.0.1", True),
    ],
)
def test_the_kernel_tells_who_listens_where(family, address, here_only):
    try:
        server = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {address}")
    with server:
        (found,) = [
            each for each in listening([os.getpid()]) if each.port == server.getsockname()[1]
        ]
    assert (found.pid, found.is_here_only) == (os.getpid(), here_only)


def test_only_sockets_that_take_connections_count():
    table = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:7A17 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1
   1: 0100007F:1F90 0100007F:7A17 01 00000000:00000000 00:00000000 00000000     0        0 222 1
"""
    assert [(inode, str(address), port) for inode, (address, port) in parsed(table)] == [
        ("111", "0.0.0.0", 31255)
    ]
