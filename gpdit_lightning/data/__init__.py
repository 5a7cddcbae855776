"""Latent shards on disk, and the batches a training run makes of them."""
