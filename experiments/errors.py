"""What a user can put right."""


class ConfigError(ValueError):
    """A setting is missing or wrong; the message says which and what to do."""
