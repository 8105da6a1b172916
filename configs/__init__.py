"""Configuration schema, YAML recipes and the shared vocabulary. Imports neither torch, Ray nor vLLM."""
