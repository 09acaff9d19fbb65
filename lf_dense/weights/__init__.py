"""Weights: reading checkpoints, finding a backbone in them, converting, publishing and saving."""
