"""Apache Beam pipelines whose elements are batches of columns."""

import logging

__version__ = "0.1.0"

# Importing Beam warns of a missing cloud package, which nothing here needs.
logging.getLogger().addFilter(
    lambda record: not record.getMessage().startswith("apitools not found")
)
