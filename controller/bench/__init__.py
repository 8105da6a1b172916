"""Benchmarks of the whole product, run by ``paceline bench NAME``."""
