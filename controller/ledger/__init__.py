"""The ledger: every group's life, in a journal that survives a crash."""
