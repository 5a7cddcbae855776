"""What the features of a trained model hold: linear probes, features for other models."""
