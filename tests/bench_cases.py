"""What the tests of the benchmark runner share."""

from __future__ import annotations


def rows_of(document: dict, peer: str) -> list[dict]:
    """The rows of one peer in the JSON of a run."""
    return [row for row in document["rows"] if row["peer"] == peer]
