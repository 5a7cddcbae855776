"""Features of a trained model: linear probes of every layer, and features for other models."""
