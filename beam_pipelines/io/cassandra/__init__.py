"""Cassandra: what its tables look like, how it is reached, and the sink."""
