"""Losses: from log-probabilities of trained tokens to a loss of each of them."""
