"""Paceline: cluster-scale RL post-training for language models.

The packages lie at the top of the repository; here are links to them, under the name they are
imported by.
"""
