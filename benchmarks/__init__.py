"""Scripts that measure every published figure of this project, one command each: `python -m benchmarks.NAME`."""
