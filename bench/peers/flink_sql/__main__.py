"""Submit the job to the cluster at $FLINK_MASTER by Flink's SQL client.

Flink is the release that `stack` runs; the connectors come from Maven Central, the first time.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from string import Template

from bench.peers.fetch import jars
from bench.peers.flink_sql import JOB_NAME
from stack import Settings
from stack.downloads import release
from stack.flink import CONF, flat_yaml
from stack.java import java

CONNECTOR = "org.apache.flink:flink-connector-kafka:3.3.0-1.19"
GATEWAY = "org.apache.flink:flink-sql-gateway:1.19.1"
"""Part of the SQL client, but not of what PyPI has of Flink; the last one of 1.19 that Maven
Central's mirrors have. Nothing of it runs in the job."""

_HERE = Path(__file__).parent


def main() -> int:
    """Submit it; returns the exit code of the SQL client."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.flink_sql")
    parser.add_argument("--topic", required=True)
    parser.add_argument("--parallelism", type=int, default=4, help="slots it takes (4)")
    flags = parser.parse_args()
    settings = Settings.of_environment()
    flink, connectors = release("flink", settings), jars(CONNECTOR, settings)
    gateway = jars(GATEWAY, settings, alone=True)
    host, _, port = os.environ["FLINK_MASTER"].partition(":")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text(
            f"execution.target: remote\nrest.address: {host}\nrest.port: {port}\n"
        )
        script = Path(folder, "job.sql")
        script.write_text(
            Template((_HERE / "job.sql").read_text()).safe_substitute(
                job_name=JOB_NAME,
                topic=flags.topic,
                parallelism=flags.parallelism,
                bootstrap_servers=os.environ["KAFKA_BOOTSTRAP_SERVERS"],
            )
        )
        added = [f"--jar={jar}" for jar in sorted(connectors.glob("*.jar"))]
        # The client looks at options of Python's, even where there are none.
        libraries = [*flink.glob("opt/*.jar"), *gateway.glob("*.jar")]
        classpath = ":".join([f"{flink}/lib/*", *map(str, libraries)])
        client = subprocess.run(
            [
                *(java(), *_java_flags(), "-cp", classpath),
                *("org.apache.flink.table.client.SqlClient", "embedded", "-f", str(script), *added),
            ],
            env={**os.environ, "FLINK_CONF_DIR": folder, "FLINK_LIB_DIR": f"{flink}/lib"},
            check=False,
            capture_output=True,
            text=True,
        )
    print(client.stdout, client.stderr)
    return 1 if client.returncode or "[ERROR]" in client.stdout else 0


def _java_flags() -> list[str]:
    """Return what Flink needs on the Java that `stack` runs it on."""
    return flat_yaml((CONF / "config.yaml").read_text())["env.java.opts.all"].split()


if __name__ == "__main__":
    sys.exit(main())
