"""How long pipelines take for a batch: GPipe, 1F1B and zero-bubble, by their recursions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..plan import StageReport

# seconds that one batch's messages occupy a link, by (producer, consumer)
LinkTimes = dict[tuple[int, int], float]
Seconds = tuple[float, float, float, float]  # a stage's forward, backward, update, sources
# of a backward goes to weight gradients where there are parameters: a linear map's two products
WEIGHT_SHARE = 0.5


def depths(links: LinkTimes, stages: int) -> list[int]:
    """Each stage's depth: links on the longest way to it."""
    depth = [0] * stages
    for producer, consumer in sorted(links):
        depth[consumer] = max(depth[consumer], depth[producer] + 1)
    return depth


def pipelines(
    stages: Sequence[StageReport],
    times: Sequence[Seconds],
    depth: Sequence[int],
    links: LinkTimes,
    latency: float,
    m: int,
) -> Iterator[tuple[str, float, list[int]]]:
    """Pipeline schedules of ``m`` micro-batches, every depth taken as one stage: name, seconds of
    a batch, and micro-batches whose activations each stage holds.
    """
    p, at = max(depth) + 1, torch.tensor(depth, device="cpu")
    forward, backward, update, _ = torch.tensor(times, dtype=torch.float64, device="cpu").T
    shares = [WEIGHT_SHARE * (stage.parameters > 0) for stage in stages]
    weights = backward * torch.tensor(shares, device="cpu")
    parts = torch.stack([forward / m, backward / m, (backward - weights) / m, weights / m, update])
    f, b, i, w, u = parts.new_zeros(5, p).scatter_reduce(1, at.expand(5, -1), parts, "amax")
    hops = parts.new_zeros(p - 1)  # longest message from each depth to the next
    for k, consumer in sorted(links, key=lambda link: depth[link[1]] - depth[link[0]]):
        passed = hops[depth[k] : depth[consumer]]
        # a skip goes directly: one delay bounds it
        passed[int(passed.argmax())].clamp_(min=links[k, consumer] / m)
    first, pace = _flow(f, hops, latency)
    back, back_pace = (v.flip(0) for v in _flow(b.flip(0), hops.flip(0), latency))
    gpipe = first[-1] + (m - 1) * pace[-1] + back + (m - 1) * back_pace + u
    yield "GPipe", float(gpipe.max()), [m] * len(depth)
    yield "1F1B", _alternate(f, b, 0 * w, u, hops, latency, m), [min(p - d, m) for d in depth]
    yield "zero-bubble", _alternate(f, i, w, u, hops, latency, m), [min(p, m)] * len(depth)


def _flow(times: Tensor, hops: Tensor, latency: float) -> tuple[Tensor, Tensor]:
    """When the first of equal jobs leaves each stage of a flow shop whose links are machines too,
    and what each further job adds.
    """
    none = times.new_zeros(1)
    first = times.cumsum(0) + torch.cat([none, (hops + latency).cumsum(0)])
    return first, torch.maximum(times, torch.cat([none, hops])).cummax(0).values


def _alternate(
    f: Tensor, i: Tensor, w: Tensor, u: Tensor, hops: Tensor, latency: float, m: int
) -> float:
    """1F1B, or ZB-H1 where weight gradients take time w apart from input gradients i; seconds until
    all is updated.

    At turn a, stage k makes the forward of micro-batch a - k. Up to turn p - 1 that is a flow shop;
    each later turn is a micro-batch's backward through all stages, a running maximum, and then all
    stages' next forwards.
    """
    p = len(f)
    stage = torch.arange(p, device="cpu")
    first, pace = _flow(f, hops, latency)
    last = first + (p - 1 - stage).clamp(max=m - 1) * pace  # end of each stage's latest forward
    more = (p - 2 - stage[:-1]).clamp(max=m - 1)
    sent = first[:-1] + hops + more * torch.maximum(pace[:-1], hops)  # link free again
    free, returned = last, torch.zeros_like(hops)
    delay = hops + latency
    below = (i + torch.cat([delay, delay.new_zeros(1)])).flip(0).cumsum(0).flip(0)
    for j in range(m):
        ready = torch.cat([torch.maximum(free[:-1], returned + delay), free[-1:]])
        back = (ready - below + i).flip(0).cummax(0).values.flip(0) + below
        returned = torch.maximum(back[1:], returned) + hops
        free = torch.where(stage <= j, back + w, back)
        sent = torch.maximum(last[:-1], sent) + hops
        last = torch.maximum(free, torch.cat([free[:1], sent + latency])) + f
        free = torch.where(stage > j + p - m, last, free)  # the others have made all their forwards
    return float((free + stage.clamp(max=m) * w + u).max())
