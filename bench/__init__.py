"""Benchmarks. One module per family declares cases; `harness` measures them, `report` shows them."""
