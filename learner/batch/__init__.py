"""From samples to packed microbatches."""
