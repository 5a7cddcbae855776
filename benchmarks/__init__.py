"""Every figure this project claims, by one command each: `python -m benchmarks.NAME`."""
