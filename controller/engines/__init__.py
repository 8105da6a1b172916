"""The rollout workers as the controller sees them: a pool that routes, watches and replaces."""
