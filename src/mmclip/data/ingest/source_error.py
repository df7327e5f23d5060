"""The error of a source that cannot be read."""


class SourceError(ValueError):
    """A data set or its mapping cannot be read; the message names the place and the next step."""
