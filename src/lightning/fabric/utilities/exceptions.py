"""The error for arguments, methods and return values that do not fit together."""


class MisconfigurationException(Exception):
    """What the user asked for cannot work: the message says what was given, what is accepted, and what to change."""
