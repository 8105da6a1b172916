"""Checkpoints that any mesh can load, and weights for publication."""
