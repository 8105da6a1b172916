"""Limits of what can be trained: other configurations are refused before anything starts."""
