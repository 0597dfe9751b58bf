"""Benchmarks: measured, with provenance; plots are drawn from the data."""
