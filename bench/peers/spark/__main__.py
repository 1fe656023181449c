"""Run job.py in an environment that has Spark, until it is ended."""

import argparse
import os
import sys
from pathlib import Path

from bench.peers.fetch import environment, jars
from stack import Settings
from stack.java import java

VERSION = "3.5.7"
CONNECTOR = f"org.apache.spark:spark-sql-kafka-0-10_2.12:{VERSION}"
_GIVEN = ("hadoop-client-", "scala-library-", "slf4j-api-", "commons-logging-", "jsr305-")
"""Jars that Spark itself has."""


def main() -> None:
    """Become job.py."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.spark")
    parser.add_argument("--topic", required=True)
    parser.add_argument("--folder", required=True, help="of checkpoints; emptied first")
    parser.add_argument("--progress", required=True, help="file of how far each query is, as JSON")
    flags = parser.parse_args()
    settings = Settings.of_environment()
    python = environment(f"pyspark=={VERSION}", settings)
    connector = jars(CONNECTOR, settings).glob("*.jar")
    needed = [str(jar) for jar in connector if not jar.name.startswith(_GIVEN)]
    os.environ["JAVA_HOME"] = str(Path(java()).resolve().parent.parent)
    job = [str(Path(__file__).with_name("job.py")), flags.topic, flags.folder, flags.progress]
    brokers = os.environ["KAFKA_BOOTSTRAP_SERVERS"]
    os.execv(python, [str(python), *job, brokers, ",".join(needed)])


if __name__ == "__main__":
    sys.exit(main())
