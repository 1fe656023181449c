"""The activity job in Spark Structured Streaming: `python -m bench.peers.spark --topic=TOPIC`."""

QUERIES = ("enriched", "page_views", "active_users", "sessions")
"""Each one reads the topic by itself: a query of Spark has one sink."""
