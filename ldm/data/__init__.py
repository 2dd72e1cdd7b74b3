"""Captioned images: what the training scripts read."""
