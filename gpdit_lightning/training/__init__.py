"""What every stage's training shares: optimiser, EMA, checkpoints, health, logs. Knows no stage."""
