"""How good a model is: numbers that its training did not minimise."""
