"""What a check raises that finds something wrong, besides what the rooms themselves raise.

CheckError
├── Trouble     it was tried, and is not as it must be
└── NotTried    there is nothing to try: it does not concern this service
"""


class CheckError(Exception):
    """A check has not passed; the text says why and holds no secret."""


class Trouble(CheckError):
    """What was tried is not as it must be."""


class NotTried(CheckError):
    """What would be tried is not there, and need not be."""
