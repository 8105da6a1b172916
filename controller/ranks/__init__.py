"""The learner ranks as the controller sees them: one learner that steps, saves and is watched."""
