"""The learner: model, mesh, packing, losses, optimiser, checkpoints, and the actor around them.

It turns a training batch into the next weight version. Must not know rollout engines or rewards:
log-probabilities and advantages arrive in the batch.
"""
