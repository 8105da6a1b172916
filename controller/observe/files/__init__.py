"""What a run writes: records, metrics, versions, summary, and the folder they lie in."""
