"""The configuration schema, one section a file."""

from paceline.configs.schema.run import RunConfig

__all__ = ["RunConfig"]
