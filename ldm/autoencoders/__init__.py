"""Autoencoders and their losses."""
