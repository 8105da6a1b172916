"""What a run shows while it goes: the live panel, or lines where there is no terminal."""
