"""Curves of runs, and their comparison with those of healthy runs."""
