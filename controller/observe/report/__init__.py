"""What a run shows afterwards: one HTML page, and curves of several runs."""
