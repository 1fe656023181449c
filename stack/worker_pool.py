"""Beam's worker pool on one address: `worker_pool.py HOST PORT`.

Beam's own command listens on all of the machine's addresses, and whoever reaches it may
have workers run what they like.
"""

import logging
import os
import sys

import grpc
from apache_beam.portability.api import beam_fn_api_pb2_grpc
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer
from apache_beam.utils.thread_pool_executor import shared_unbounded_instance

# What Beam gives workers that it starts by itself: --max_cache_memory_usage_mb=100.
_STATE_CACHE_BYTES = 100 << 20
_BEAMS_DEFAULT = -1

# Batches take megabytes for milliseconds. glibc would give them back to the system each time,
# which then clears the pages anew: 5 % of a busy machine's time. Arrow's allocator, mimalloc,
# would after 10 ms. With one arena for all threads, where each had its own, a worker of the
# whole job took 4,800 new pages a second instead of 11,800, and had 1.3 GB resident, not 1.9.
_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(256 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
    "MIMALLOC_PURGE_DELAY": "10000",  # ms
}


def main(host: str, port: str) -> None:
    """Serve until the process is ended; `stack` ends the workers with it."""
    # Forced: importing Beam has logged something already.
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    for name, value in _MALLOC.items():  # workers inherit it
        os.environ.setdefault(name, value)
    server = grpc.server(shared_unbounded_instance())
    pool = BeamFnExternalWorkerPoolServicer(
        use_process=True,
        state_cache_size=_STATE_CACHE_BYTES,
        data_buffer_time_limit_ms=_BEAMS_DEFAULT,
    )
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
    server.add_insecure_port(f"{host}:{port}")
    server.start()
    logging.info("Listening for workers at %s:%s", host, port)
    server.wait_for_termination()


if __name__ == "__main__":
    main(*sys.argv[1:])
