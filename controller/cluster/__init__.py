"""Ray: the cluster of a run, actors on it, and room for them on its nodes."""
