"""Evaluation of generated videos: continuations, networks, scores, self-checks and reports (GPDiT, section 5.2)."""
