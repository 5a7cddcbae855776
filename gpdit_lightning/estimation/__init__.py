"""Estimates of FLOPs and memory of a training run, and of the nearest settings that fit."""
