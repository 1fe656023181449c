"""What flows: schemas, batches, the time rule, windows, tables."""
