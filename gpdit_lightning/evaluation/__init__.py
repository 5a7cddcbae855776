"""How good a model is: scores of what it generates, and what its features know (GPDiT, sections 5.2, 5.3 and A.2)."""
