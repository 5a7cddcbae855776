"""Damaged inputs for every reader of the library: `python -m benchmarks.fuzz --count 1000`.

A case damages one or several files of a small undamaged set (shards, indexes, manifests, checkpoints, exported models,
recipes, videos and images), runs a command on them in a forked process with limits on time and memory, and compares the
outcome with that of the same command on undamaged files. The number of a case determines it completely.
"""
