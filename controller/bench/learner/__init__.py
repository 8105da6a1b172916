"""The learner's step beside a peer's: tokens a second, and memory."""
