"""The activity job in Flink SQL: `python -m bench.peers.flink_sql --topic=TOPIC`."""

JOB_NAME = "flink-sql-activity"
