"""The activity job in Spark Structured Streaming 3.5, without external sinks.

    job.py TOPIC CHECKPOINTS PROGRESS BROKERS JARS

Tuned by Spark's own guide (structured-streaming-programming-guide.html, "RocksDB state
store implementation" and "Kafka integration"): RocksDB with a changelog, as many shuffle
partitions as cores, a bound on what a trigger takes, no triggers without data.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as f

PER_TRIGGER = 500_000
"""Records: some ten seconds' worth, as each trigger is a checkpoint."""

CORES = os.cpu_count() or 1
EVENT = "event_id STRING, event_time STRING, user_id STRING, page_url STRING, event_type STRING"
TYPES = ("page_view", "click", "session_start", "session_end")

CONFIGURATION = {
    "spark.driver.memory": "4g",  # in local mode all of Spark is the driver
    "spark.ui.enabled": "false",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.shuffle.partitions": CORES,
    "spark.sql.streaming.stateStore.providerClass": (
        "org.apache.spark.sql.execution.streaming.state.RocksDBStateStoreProvider"
    ),
    "spark.sql.streaming.stateStore.rocksdb.changelogCheckpointing.enabled": "true",
    "spark.sql.streaming.noDataMicroBatches.enabled": "false",
}


def events(spark: SparkSession, topic: str, brokers: str) -> DataFrame:
    """Return the usable events, each once."""
    records = (
        spark.readStream.format("kafka")
        .option("kafka.bootstrap.servers", brokers)
        .option("subscribe", topic)
        .option("startingOffsets", "earliest")
        .option("maxOffsetsPerTrigger", PER_TRIGGER)
        .load()
    )
    parsed = records.select(
        f.from_json(f.col("value").cast("string"), EVENT).alias("event"),
        f.col("timestamp").alias("append_time"),
    ).select("event.*", "append_time")
    ts = f.to_timestamp("event_time")
    usable = parsed.withColumn("ts", ts).where(
        f.col("event_id").isNotNull()
        & f.col("user_id").isNotNull()
        & f.col("page_url").isNotNull()
        & f.col("event_type").isin(*TYPES)
        # No more than 2 + 2 minutes late, no more than 5 minutes ahead.
        & (f.col("ts") >= f.col("append_time") - f.expr("INTERVAL 4 MINUTES"))
        & (f.col("ts") <= f.col("append_time") + f.expr("INTERVAL 5 MINUTES"))
    )
    return (
        usable.select("event_id", "ts", "user_id", "page_url", "event_type")
        .withWatermark("ts", "4 minutes")
        .dropDuplicatesWithinWatermark(["event_id"])
    )


def queries(spark: SparkSession, topic: str, brokers: str) -> dict[str, DataFrame]:
    """Return the results by name; each reads the topic and deduplicates by itself."""

    def source() -> DataFrame:
        return events(spark, topic, brokers)

    def count_of(event_type: str) -> Column:
        return f.count(f.when(f.col("event_type") == event_type, 1))

    return {
        "enriched": source(),
        "page_views": source()
        .where(f.col("event_type") == "page_view")
        .groupBy(f.window("ts", "1 minute"), "page_url")
        .count(),
        "active_users": source()
        .groupBy(f.window("ts", "5 minutes", "1 minute"))
        .agg(f.approx_count_distinct("user_id", 0.016)),
        "sessions": source()
        .groupBy(f.session_window("ts", "30 minutes"), "user_id")
        .agg(count_of("page_view").alias("page_views"), count_of("click").alias("clicks")),
    }


def main(topic: str, folder: str, progress: str, brokers: str, jars: str) -> None:
    """Run until ended; the file `progress` says how many records each query has handled."""
    builder = SparkSession.builder.master(f"local[{CORES}]").appName("activity")
    for name, value in {**CONFIGURATION, "spark.jars": jars}.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    shutil.rmtree(folder, ignore_errors=True)
    running = {
        name: result.writeStream.format("noop")
        .outputMode("append")
        .option("checkpointLocation", f"{folder}/{name}")
        .queryName(name)
        .start()
        for name, result in queries(spark, topic, brokers).items()
    }
    read = dict.fromkeys(running, 0)
    while True:
        for name, query in running.items():
            if query.exception() is not None:
                sys.exit(str(query.exception()))
            if (last := query.lastProgress) is not None:
                ends = last["sources"][0]["endOffset"] or {}
                read[name] = sum(ends.get(topic, {}).values())
        written = Path(f"{progress}.new")
        written.write_text(json.dumps(read))
        written.rename(progress)
        time.sleep(0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])
