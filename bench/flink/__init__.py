"""Measures the activity pipeline on Flink, fed by Kafka: `python -m bench.flink`."""
