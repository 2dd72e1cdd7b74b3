"""Latent diffusion, every stage of it: mathematics, models and data."""
