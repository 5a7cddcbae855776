"""Checkpoints and exported models: how they lie on disk, and how they are written and opened."""
