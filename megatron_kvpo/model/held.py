"""What a block that is recomputed need not compute twice: taken at its first run, used at its next.

Who makes such results asks `taken` for them, and says what it made to `keep`; `Recompute` says
whether anybody listens. Each costs as much memory as the block's input, and spares a good part of
its arithmetic: attention's results half of a long pass's, the feed-forward's second product a third
of the other products'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

Results = tuple[Tensor | None, ...]
"""What was made, and what backward wants besides; there may be gaps."""

ATTENTION, FFN = KINDS = ("attention", "ffn")
"""Of results, those of most worth a byte first."""


class Held:
    """Results of one block, of some kinds. They have no graph and are used once."""

    def __init__(self, kinds: Sequence[str] = KINDS) -> None:
        self.again = False
        self.results: dict[str, list[Results]] = {kind: [] for kind in kinds}

    def num_bytes(self, kind: str) -> int:
        """What those of a kind take."""
        tensors = (t for results in self.results.get(kind, ()) for t in results if t is not None)
        return sum(t.numel() * t.element_size() for t in tensors)

    @contextmanager
    def running(self, *, again: bool) -> Iterator[None]:
        """Inside, the block leaves its results here, or takes them if it runs `again`."""
        global _held
        before, _held, self.again = _held, self, again
        try:
            yield
        finally:
            _held = before
            if again:  # it may have stopped early, once backward had all that it wants
                for results in self.results.values():
                    results.clear()


_held: Held | None = None
"""Of the block that runs under recomputation, if it is to hold something."""


def taken(kind: str) -> Results | None:
    """What was made here in the first run, if this is the second and it was held."""
    if _held is None or not _held.again or kind not in _held.results:
        return None
    return _held.results[kind].pop(0)


def keep(kind: str, results: Results) -> None:
    """Hold what was made, if this is the first run of a block that holds this kind."""
    if _held is not None and not _held.again and kind in _held.results:
        _held.results[kind].append(tuple(None if t is None else t.detach() for t in results))


def results_of(kind: str, make: Callable[[], Results]) -> Results:
    """What `make` makes, or what it made in the first run."""
    found = taken(kind)
    if found is None:
        found = make()
        keep(kind, found)
    return found
