"""Outside systems, one module each: source and sink together."""
