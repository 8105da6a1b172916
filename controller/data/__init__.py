"""Where prompts come from, how they are rendered, and in which order they are drawn."""
