"""The single controller: it decides what is generated, graded, trained and published, and when.

Owns the loop, the freshness arithmetic, the work buffer and its ledger, batching, advantages,
supervision, placement, a run's checkpoint and report, the wiring and the command line. Only
``wiring/`` names concrete classes of other packages, and no other package imports this one. Tensors
never come here: batches are numpy.
"""
