"""Columnar functions: pure, no Beam in them."""
