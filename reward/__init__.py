"""Graders: a completion and its prompt in, a score out.

This package must not import engines, the learner or the controller. A grader gets text, the
reference answer and the metadata that its prompt source attached, and nothing else.
"""
