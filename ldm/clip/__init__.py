"""CLIP (Radford et al. 2021): built and trained with open_clip, exported to transformers."""
