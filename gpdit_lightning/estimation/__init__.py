"""What a recipe costs before it runs: FLOPs, memory, and the nearest setting that fits."""
