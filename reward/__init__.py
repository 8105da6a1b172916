"""Graders: a completion and its prompt in, a score out.

Must not know engines, the learner or the controller; a grader sees text, the reference answer and
the metadata that its prompt source attached, and nothing else.
"""
