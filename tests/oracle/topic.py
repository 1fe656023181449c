"""The raw input of the oracle, from a topic."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from tests.oracle.oracle import RAW

_ANSWER_S = 20
_WAIT_S = 1.0


def dump(bootstrap_servers: str, topic: str, path: Path) -> int:
    """Write all records of a topic to a Parquet file of RAW; returns how many."""
    records = consumed(bootstrap_servers, topic)
    columns = {
        "topic": [record.topic() for record in records],
        "partition": [record.partition() for record in records],
        "offset": [record.offset() for record in records],
        "append_us": [record.timestamp()[1] * 1000 for record in records],
        "payload": [record.value() for record in records],
    }
    pq.write_table(pa.table(columns, schema=RAW), path)
    return len(records)


def consumed(bootstrap_servers: str, topic: str) -> list[Message]:
    """Return all records of a topic, each partition's in offset order."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "oracle",  # must be named; nothing is committed to it
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    try:
        described = consumer.list_topics(topic, timeout=_ANSWER_S).topics[topic]
        if described.error is not None:
            raise LookupError(f"there is no topic {topic}: {described.error}")
        consumer.assign([TopicPartition(topic, number, 0) for number in described.partitions])
        records: list[Message] = []
        ended: set[int] = set()
        while len(ended) < len(described.partitions):
            for message in consumer.consume(1000, _WAIT_S):
                error = message.error()
                if error is None:
                    records.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    ended.add(message.partition())
        return records
    finally:
        consumer.close()
