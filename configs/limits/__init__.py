"""What cannot be trained as configured, refused before anything starts."""
