"""What training costs, computed before it runs: FLOPs, memory, and the nearest settings that fit."""
