"""Helpers of the training scripts: checkpoints, keyed randomness, precision, optimisation, tracking. No Trainer."""
