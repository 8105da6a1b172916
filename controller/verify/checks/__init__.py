"""The checks of a verification, and how their evidence is judged."""
