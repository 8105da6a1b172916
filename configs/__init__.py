"""Configuration schema, YAML recipes and the shared vocabulary. No torch, Ray or vLLM."""
