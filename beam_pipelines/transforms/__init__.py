"""PTransforms over batches of columns."""
