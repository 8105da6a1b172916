"""What a run shows while it works and leaves behind: records, views, run folder, report."""
