"""What a configuration would take: parameters, memory, placement."""
