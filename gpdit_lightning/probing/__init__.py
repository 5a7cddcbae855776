"""Features of a trained model: linear probes of every layer, and features for other models (GPDiT, 5.3 and A.2)."""
