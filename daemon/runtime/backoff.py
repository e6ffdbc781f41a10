"""Backoff: how long to wait before the next attempt."""

import random


class Backoff:
    """Doubling delays with jitter, so that a fleet does not come back in step."""

    def __init__(self, first_s: float = 0.5, most_s: float = 30.0, jitter: float = 0.2) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._jitter = jitter
        self._next_s = first_s

    def next_s(self) -> float:
        """The delay before the next attempt."""
        delay = self._next_s
        self._next_s = min(self._most_s, delay * 2)
        return delay * (1 + self._jitter * (2 * random.random() - 1))  # noqa: S311 - not a secret

    def reset(self) -> None:
        """The last attempt went well."""
        self._next_s = self._first_s
