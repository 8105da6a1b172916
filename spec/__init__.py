"""Speculative drafting: the suffix drafter and the proposer, later budgets and draft heads.

Must not know the controller or the learner. A drafter only proposes tokens: what is sampled stays
the verifier's business, so nothing here can change the distribution of a rollout.
"""
