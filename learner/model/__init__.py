"""The model: loading, attention over packed rows, heads, chunked layers, experts."""
