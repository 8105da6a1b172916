"""Speculative decoding: the suffix drafter, its proposer for vLLM, and draft budgets.

This package must not import the controller or the learner. A drafter only proposes tokens and the
verifier samples, so nothing here can change the distribution of a rollout.
"""
