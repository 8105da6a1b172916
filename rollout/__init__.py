"""Rollout workers: the actor, the vLLM engine in it, and the segments that it samples.

The only package that imports vLLM. Must not know the learner: new weights arrive through
``weights_sync``, and every token is returned with the version that sampled it.
"""
