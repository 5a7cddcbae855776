"""What the training of every stage shares: optimizer, strategies, loggers, callbacks. Independent of the stages."""
