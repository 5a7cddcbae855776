"""Formats of checkpoints and exported models, and functions that write and open them."""
