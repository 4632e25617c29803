"""Measured figures, each beside a bare or peer counterpart run in the same call: `python -m benchmarks.NAME --json`."""
