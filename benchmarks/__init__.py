"""Scripts that measure the published figures of this project: `python -m benchmarks.NAME`."""
