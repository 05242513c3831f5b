"""The search against brute force: all sets of positions, all acyclic partitions, with costs
reckoned another way.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from dni_fx.passes.search import bounding, closures, frontiers, searching
from dni_fx.passes.search.chains import Wishes
from dni_fx.passes.search.chains import solve as solve_chain
from dni_fx.passes.search.loads import Loads


@dataclass
class Graph:
    """Nodes in program order, the last one the output; ``users`` are positions."""

    compute: list[int]
    memory: list[int]
    users: list[list[int]]
    source: list[int]
    source_bytes: list[int]
    nbytes: list[int]
    transfer: list[int]

    @property
    def count(self) -> int:
        """Nodes besides the output."""
        return len(self.compute) - 1

    def loads(self) -> Loads:
        """The same for the library."""
        values = [v for v in range(self.count) if self.users[v]]
        edges = [(i, u) for i, v in enumerate(values) for u in self.users[v]]
        pick = lambda table: torch.tensor([table[v] for v in values])  # noqa: E731
        return Loads(
            torch.tensor(self.compute),
            torch.tensor(self.memory),
            torch.tensor(values),
            torch.tensor([len(self.users[v]) for v in values]),
            torch.tensor([i for i, _ in edges]),
            torch.tensor([u for _, u in edges]),
            pick(self.source),
            pick(self.source_bytes),
            pick(self.nbytes),
            pick(self.transfer),
            torch.ones(len(values), dtype=torch.bool),
            torch.zeros(len(values), dtype=torch.bool),
        )

    def stage(self, nodes: set[int]) -> tuple[int, int, int]:
        """Time, memory and received bytes of a stage, one value at a time."""
        last = self.count in nodes
        time = sum(self.compute[n] for n in nodes)
        memory = sum(self.memory[n] for n in nodes)
        received = 0
        for value, users in enumerate(self.users):
            inside = [u for u in users if u in nodes]
            outside = [u for u in users if u not in nodes]
            if value in nodes and outside and not (last and outside == [self.count]):
                time += self.source[value] + self.transfer[value]
                memory += self.source_bytes[value]
            if value not in nodes and inside:
                time += self.transfer[value]
                memory += self.nbytes[value]
                received += self.nbytes[value]
        return time, memory, received


def random_graph(rng: random.Random, most: int) -> Graph:
    count = rng.randint(2, most)
    users: list[list[int]] = [[] for _ in range(count + 1)]
    for user in range(1, count):
        needed = {rng.randrange(user) for _ in range(rng.randint(0, 2))}
        for value in sorted(needed | ({user - 1} if rng.random() < 0.7 else set())):
            users[value].append(user)
    for value in range(count):
        if not users[value] or rng.random() < 0.1:
            users[value].append(count)
    some = lambda top: [rng.randint(0, top) for _ in range(count)] + [0]  # noqa: E731
    return Graph(some(20), some(9), users, some(8), some(5), [n + 1 for n in some(9)], some(4))


def wishes_for(rng: random.Random, graph: Graph) -> Wishes:
    positions = [p for p in range(1, graph.count) if rng.random() < 0.8]
    stages = rng.randint(1, min(4, len(positions) + 1))
    required = tuple(sorted(rng.sample(positions, rng.randint(0, min(1, stages - 1)))))
    speeds = tuple(rng.choice([0.5, 1.0, 2.0]) for _ in range(stages)) if rng.random() < 0.4 else ()
    cap = float(rng.randint(5, 60)) if rng.random() < 0.4 else math.inf
    return Wishes(
        stages,
        allowed=tuple(positions),
        required=required,
        speeds=speeds,
        memory_cap=cap,
        polish=1.0,
    )


def chains(graph: Graph, wishes: Wishes) -> Iterator[list[set[int]]]:
    """Every choice of positions."""
    assert wishes.stages is not None
    for cuts in itertools.combinations(wishes.allowed, wishes.stages - 1):
        if set(wishes.required) <= set(cuts):
            ends = [0, *cuts, graph.count + 1]
            yield [set(range(a, b)) for a, b in itertools.pairwise(ends)]


def partitions(graph: Graph, stages: int) -> Iterator[list[set[int]]]:
    """Every partition into ordered stages, none empty, whose edges all go forwards; the output is
    in the last one.
    """
    for labels in itertools.product(range(stages), repeat=graph.count):
        if set(labels) != set(range(stages)):
            continue
        stage_of = [*labels, stages - 1]
        if all(stage_of[v] <= stage_of[u] for v in range(graph.count) for u in graph.users[v]):
            yield [{n for n, k in enumerate(stage_of) if k == s} for s in range(stages)]


def judge(graph: Graph, stages: list[set[int]], speeds: Sequence[float]) -> tuple[float, int, int]:
    costs = [graph.stage(s) for s in stages]
    speeds = speeds or (1.0,) * len(stages)
    return (
        max(c[0] / s for c, s in zip(costs, speeds, strict=True)),
        max(c[1] for c in costs),
        sum(c[2] for c in costs),
    )


def brute(
    graph: Graph, choices: Iterator[list[set[int]]], wishes: Wishes
) -> tuple[float, int] | None:
    """Slowest stage of the best choice within the cap, and fewest bytes among those."""
    fits = [j for c in choices if (j := judge(graph, c, wishes.speeds))[1] <= wishes.memory_cap]
    if not fits:
        return None
    best = min(j[0] for j in fits)
    return best, min(j[2] for j in fits if j[0] <= best)


def mismatches(
    rng: random.Random, solve: Callable[..., Any] = solve_chain, graphs: int = 100
) -> int:
    wrong = 0
    for _ in range(graphs):
        graph = random_graph(rng, 14)
        wishes, loads = wishes_for(rng, graph), graph.loads()
        expected = brute(graph, chains(graph, wishes), wishes)
        answer = solve(frontiers.prefixes(loads, wishes.allowed), wishes)
        found = None if answer is None else (answer.slowest, answer.traffic)
        wrong += found != expected
    return wrong


def test_positions_are_the_best_of_all(rng: random.Random) -> None:
    assert mismatches(rng) == 0


def test_a_search_that_forgets_what_is_received_is_noticed() -> None:
    """Negative control."""

    def forgetful(found: frontiers.Frontiers, wishes: Wishes) -> Any:
        loads = replace(found.loads, transfer=found.loads.transfer * 0)
        return solve_chain(replace(found, loads=loads), wishes)

    assert mismatches(random.Random(0), forgetful) > 10


def test_closed_sets_hold_the_best_of_all_partitions(rng: random.Random) -> None:
    for _ in range(20):
        graph = random_graph(rng, 7)
        stages = rng.randint(1, min(3, graph.count))
        wishes = Wishes(stages, polish=1.0)
        loads = graph.loads()
        before = [
            sum(1 << v for v in range(graph.count) if u in graph.users[v])
            for u in range(graph.count)
        ]
        after = [tuple(u for u in graph.users[v] if u < graph.count) for v in range(graph.count)]
        units = closures.Units(
            tuple(1 << v for v in range(graph.count)), tuple(before), tuple(after)
        )
        sets = closures.closed_sets(units, 10_000)
        assert sets is not None
        masks = [closures.nodes_of(units, s) for s in sets]
        found = frontiers.from_masks(loads, masks, (1 << graph.count) - 1)
        answer = solve_chain(found, wishes)
        expected = brute(graph, partitions(graph, stages), wishes)
        assert answer is not None
        assert (answer.slowest, answer.traffic) == expected
        assert bounding.lower_bound(loads, (1.0,) * stages) <= answer.slowest * (1 + 1e-9)
        chain = solve_chain(frontiers.prefixes(loads, range(1, graph.count)), wishes)
        assert chain is not None
        assert answer.slowest <= chain.slowest


def test_the_bound_is_a_bound_for_unequal_stages(rng: random.Random) -> None:
    for _ in range(20):
        graph = random_graph(rng, 6)
        speeds = (2.0, 0.5)
        expected = brute(graph, partitions(graph, 2), Wishes(2, speeds=speeds))
        assert expected is not None
        assert bounding.lower_bound(graph.loads(), speeds) <= expected[0] * (1 + 1e-9)


def test_large_graphs_are_searched_near_what_a_few_places_tell(
    monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    """All wishes are kept, and few answers are worse than the best of all positions."""
    monkeypatch.setattr(searching, "_DENSE", 12)
    ratios = []
    for _ in range(30):
        graph = random_graph(rng, 60)
        wishes = wishes_for(rng, graph)
        best = solve_chain(frontiers.prefixes(graph.loads(), wishes.allowed), wishes)
        found = searching.best_positions(graph.loads(), wishes)
        if best is None or found is None:
            assert found is None
            continue
        assert len(found.cuts) == wishes.stages - 1
        assert set(wishes.required) <= set(found.cuts) <= set(wishes.allowed)
        assert found.memory <= wishes.memory_cap
        ratios.append(found.slowest / best.slowest)
    assert min(ratios) == 1.0
    assert sorted(ratios)[len(ratios) // 2] < 1.05


def test_very_large_graphs_come_close_to_the_bound() -> None:
    count = 4000
    ones = [1] * count + [0]
    users = [[v + 1] for v in range(count)] + [[]]
    graph = Graph(ones, ones, users, ones, ones, ones, ones)
    wishes = Wishes(7, allowed=tuple(range(1, count)), polish=1.0)
    found = searching.best_positions(graph.loads(), wishes)
    assert found is not None
    assert found.slowest <= bounding.lower_bound(graph.loads(), (1.0,) * 7) + 2
