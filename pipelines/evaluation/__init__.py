"""`ldm evaluate`: what a model draws, and each of its parts alone, in figures and pictures."""
