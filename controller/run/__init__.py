"""A run's life: folder, cluster, phases, checkpoints, recovery, summary."""
