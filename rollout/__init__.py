"""Rollout workers: the actor, the vLLM engine in it, and the episodes it plays.

The only room that imports vLLM. Must not know the learner: new weights arrive through
``weights_sync``, and every token is returned with the version that sampled it.
"""
