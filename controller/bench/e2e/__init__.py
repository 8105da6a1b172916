"""Whole training steps beside a peer's, and beside our own at other settings."""
