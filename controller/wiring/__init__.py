"""From a configuration to started parts: the only folder that names other rooms' classes."""
