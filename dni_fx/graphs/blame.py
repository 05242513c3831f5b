"""Which submodules keep a traced graph from being the model: they differ when looked into, and do
not as one node each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..passes.trace.traces import Trace

_MOST_TRIALS = 40

Trial = Callable[[frozenset[str]], bool]  # whether the graph with these opaque equals the model


def find_culprits(trace: Trace, trial: Trial) -> frozenset[str] | None:
    """The innermost submodules that must be opaque for a graph to equal its model.

    All submodules of the top level are made opaque, then opened again in halves where that changes
    nothing, and within each that must stay closed likewise. Outputs, gradients and buffers are
    blamed alike, and several culprits are found.

    Args:
        trace: differs from its model.
        trial: traces the model anew and compares.

    Returns:
        Their paths: none where the graph itself is right, so that its cuts must be wrong; None
        where what differs is done by the top level itself. After 40 trials what is still closed
        stays so.
    """
    search = _Search(looked_into(trace), trial)
    if search.is_right(frozenset()):
        return frozenset()
    outermost = search.inside("")
    if not outermost or not search.is_right(frozenset(outermost)):
        return None
    return search.settle(outermost, frozenset())


def looked_into(trace: Trace) -> tuple[str, ...]:
    """Paths of the submodules that a recording went through, in order."""
    whole = {str(n.target) for n in trace.graph.nodes if n.op == "call_module"}
    return tuple(dict.fromkeys(p for p, _, _ in trace.calls if p and p not in whole))


class _Search:
    """Trials, each made once.

    Args:
        paths: of submodules that can be opaque.
        trial: whether a graph is right.
    """

    def __init__(self, paths: Collection[str], trial: Trial) -> None:
        self._paths, self._trial = paths, trial
        self._seen: dict[frozenset[str], bool] = {}

    def is_right(self, opaque: frozenset[str]) -> bool:
        """Whether the graph with these opaque is; not, where no trial is left."""
        if opaque not in self._seen:
            if len(self._seen) >= _MOST_TRIALS:
                return False
            self._seen[opaque] = self._trial(opaque)
        return self._seen[opaque]

    def inside(self, path: str) -> list[str]:
        """The outermost of the submodules within one."""
        prefix = f"{path}." if path else ""
        within = [p for p in self._paths if p.startswith(prefix) and p != path]
        return [p for p in within if not any(p.startswith(f"{q}.") for q in within)]

    def settle(self, group: list[str], others: frozenset[str]) -> frozenset[str]:
        """Those of a group that must be opaque, and of what is inside them.

        Args:
            group: opaque, beside the others, the graph is right.
            others: opaque in any case.
        """
        if self.is_right(others):
            return frozenset()
        if len(group) == 1:
            inner = self.inside(group[0])
            if inner and self.is_right(others.union(inner)):
                return self.settle(inner, others)
            return frozenset(group)
        first, second = group[: len(group) // 2], group[len(group) // 2 :]
        kept = self.settle(first, others.union(second))
        return kept | self.settle(second, others | kept)
