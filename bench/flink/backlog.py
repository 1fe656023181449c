"""A backlog: records that were appended at a steady rate, at their own time."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer, TopicPartition

from bench.flink.platform import Platform, python

USERS = 20_000


@dataclass(frozen=True)
class Backlog:
    """A topic to catch up with.

    Filled by the project's producer in an open loop, as it would happen: append times are
    the broker's, and event times agree with them. So filling takes `events / per_s` seconds,
    once: a topic that is there with all its records is used again.

    Args:
      events: Number of records, with re-sends, late and unreadable ones.
      per_s: Records per second.
      partitions: Of the topic.
    """

    events: int
    per_s: int
    partitions: int

    @property
    def topic(self) -> str:
        """Its name has all that decides what is in it."""
        return f"backlog-{self.events}-{self.per_s}-{self.partitions}"

    def fill(self, platform: Platform, say: Callable[[str], None]) -> None:
        """Make sure that it is there.

        Raises:
          RuntimeError: not all records were delivered.
        """
        if platform.records(self.topic) == self.events:
            say(f"{self.topic} is there already")
            return
        duration_s = self.events / self.per_s
        say(f"filling {self.topic}: {duration_s:,.0f} s")
        platform.make_topic(self.topic, self.partitions)
        with platform.started(
            "fill", producer_command(self.topic, self.per_s, duration_s)
        ) as producer:
            code = producer.wait()
        if code or platform.records(self.topic) != self.events:
            raise RuntimeError(f"the producer ended with {code}:\n{platform.tail('fill')}")

    def described(self, platform: Platform) -> dict[str, Any]:
        """Return its size, and the span of its append times."""
        times_ms = _border_times_ms(platform.brokers, self.topic, self.partitions)
        return {
            "topic": self.topic,
            "events": self.events,
            "partitions": self.partitions,
            "append_time": "broker",
            "append_span_s": round((max(times_ms) - min(times_ms)) / 1000, 1),
        }


def producer_command(topic: str, per_s: int, duration_s: float) -> list[str]:
    """Return the command that publishes records to a topic."""
    rate = (f"--rate={per_s}", f"--duration_s={duration_s}", f"--users={USERS}", "--seed=1")
    return python("scripts/producer.py", f"--topic={topic}", *rate)


def sent(output: str) -> dict[str, Any]:
    """Return the summary that the producer printed last."""
    summary: dict[str, Any] = json.loads(output.splitlines()[-1])
    return summary


def _border_times_ms(brokers: str, topic: str, partitions: int) -> list[int]:
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": "bench"})
    try:
        times_ms = []
        for number in range(partitions):
            first, end = consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=30)
            for offset in (first, end - 1) if end > first else ():
                consumer.assign([TopicPartition(topic, number, offset)])
                (message,) = consumer.consume(1, timeout=30)
                times_ms.append(message.timestamp()[1])
        return times_ms
    finally:
        consumer.close()
