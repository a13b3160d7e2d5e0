"""A clock that a test sets."""


class ManualClock:
    """Returns `now`, in seconds, until the test changes it."""

    now = 1000.0

    def __call__(self) -> float:
        """Return the time that the test has set."""
        return self.now
