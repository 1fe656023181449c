"""Apache Beam pipelines whose elements are batches of columns."""

__version__ = "0.1.0"
