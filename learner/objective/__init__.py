"""What is optimised: advantages, losses, aggregation."""
