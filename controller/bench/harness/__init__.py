"""What every benchmark uses: registry, result, subprocesses, timing."""
