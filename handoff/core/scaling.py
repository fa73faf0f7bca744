"""The number of workers that an operator asked for: it holds over reloads until the configured number changes."""

from __future__ import annotations


class Scaling:
    """One service's scale, and the requests that wait for it to be carried out."""

    def __init__(self) -> None:
        self._asked: tuple[int, int] | None = None
        """Workers asked for, and what the configuration said then."""
        self._requests: list[int] = []

    @property
    def is_waited_for(self) -> bool:
        return bool(self._requests)

    def ask(self, workers: int, configured: int, requests: list[int]) -> list[int]:
        """Returns the requests of the scale before, which will not be carried out any more."""
        superseded, self._requests = self._requests, requests
        self._asked = (workers, configured)
        return superseded

    def workers(self, configured: int) -> int:
        """How many a generation is to have: an edit of the configuration wins over a scale from before it."""
        if self._asked is not None and self._asked[1] == configured:
            return self._asked[0]
        return configured

    def drop_stale(self, configured: int) -> tuple[str, list[int]] | None:
        """Forget a scale that the configuration has overtaken: what is to be said of it, and to whom."""
        if self._asked is None or self._asked[1] == configured:
            return None
        text = f"workers: the configuration now says {configured}; the scale to {self._asked[0]} is dropped"
        self._asked = None
        return text, self.take_requests()

    def take_requests(self) -> list[int]:
        """Who waits, to be answered now."""
        requests, self._requests = self._requests, []
        return requests
