"""The life of a group of samples: admitted, sampled, graded, collected into a batch."""
