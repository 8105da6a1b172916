"""Errors a user can cause: one line that says what was got, what was expected and what to do."""

from __future__ import annotations


class UserError(ValueError):
    """Base of every error that the command line prints as one line, without a traceback."""


class ConfigError(UserError):
    """The configuration is unknown, contradictory or cannot be read."""


class DataError(UserError):
    """A data set, prompt or tokenizer cannot be used as asked."""


class GraderError(UserError):
    """A grader raised, or did not answer within its time limit."""


class ModelError(UserError):
    """A model folder is missing, unreadable or of another shape than asked."""


class ClusterError(UserError):
    """Ray could not be started or reached, or an actor of the run died for good."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or belongs to another run."""


class BatchError(UserError):
    """A batch lacks what the algorithm needs of it; no weight was written."""


class NonFiniteError(BatchError):
    """A number that an update depends on is infinite or not a number; no weight was written."""


class RunInterrupted(Exception):
    """The user asked the run to stop; it was saved and can be resumed."""
