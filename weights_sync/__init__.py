"""Weights' way from the learner to the engines: layouts, transports, versions, checksums.

Must not know algorithms. It moves named tensors of a weight version and proves that they arrived
whole.
"""
