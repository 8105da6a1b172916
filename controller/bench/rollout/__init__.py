"""Sampling with and without drafts, beside stock vLLM's."""
