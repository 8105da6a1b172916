"""``paceline verify``: proofs that anyone can run, on the real engine."""
