"""A plan's report in words: rows of its tables, and notes."""

from __future__ import annotations

from .plans import PlanReport, SourceReport

_MOST_NAMES = 4  # modules that are named of a stage


def stage_rows(report: PlanReport) -> list[tuple[str, ...]]:
    """A row for each stage, below the titles; seconds and bytes where all stages have costs."""
    costs = [stage.cost for stage in report.stages if stage.cost is not None]
    seconds = sum(cost.seconds for cost in costs) or 1.0
    nodes = sum(stage.nodes for stage in report.stages) or 1
    titles = ["share"]
    shares = [[f"{stage.nodes / nodes:.0%}"] for stage in report.stages]
    if len(costs) == len(report.stages):
        titles = ["time", "ms", "MB"]
        shares = [
            [f"{c.seconds / seconds:.0%}", f"{c.seconds * 1e3:.2f}", f"{c.nbytes / 1e6:.1f}"]
            for c in costs
        ]
    rows: list[tuple[str, ...]] = [("stage", "nodes", *titles, "parameters", "ends after", "holds")]
    for s, share in zip(report.stages, shares, strict=True):
        end, holds = s.cut or "(output)", _shortened(s.modules)
        rows.append((s.name, str(s.nodes), *share, f"{s.parameters:,}", end, holds))
    return rows


def interface_rows(report: PlanReport) -> list[tuple[str, ...]]:
    """A row for each interface and its source, below the titles."""
    measured = any(source.seconds is not None for source in report.sources.values())
    places = ("interface", "shape", "MB", "from", "to")
    rows: list[tuple[str, ...]] = [
        (*places, "source", "parameters", "MFLOP", "ms" if measured else "", "")
    ]
    for interface in report.interfaces:
        source = report.sources.get(interface.name, SourceReport("-", 0, 0))
        shape = " x ".join(map(str, interface.spec.shape))
        size = f"{interface.spec.nbytes / 1e6:.2f}"
        goal = ", ".join(map(str, interface.consumers))
        if interface.feeds is not None:
            goal = f"{goal} of the next window" if goal else interface.feeds
        flops = "?" if source.flops is None else f"{source.flops / 1e6:.1f}"
        seconds = "" if source.seconds is None else f"{source.seconds * 1e3:.2f}"
        cells = (source.kind, f"{source.parameters:,}", flops, seconds)
        way = (str(interface.producer), goal)
        implied = "implied" * interface.implied
        rows.append((interface.name, shape, size, *way, *cells, implied))
    return rows


def notes(report: PlanReport) -> list[str]:
    """What a plan has to say besides its tables."""
    lines = []
    if (search := report.search) is not None:
        sure = f"; exact over {search.exact}" if search.exact else ""
        lines.append(
            f"found for {search.objective} with {search.costs} costs: slowest stage "
            f"{search.slowest * 1e3:.2f} ms, sources and transfers included; bound "
            f"{search.bound * 1e3:.2f} ms, gap {search.gap:.1%}{sure}"
        )
        lines += [f"cut after {name}: {why}" for name, why in search.reasons.items()]
    if report.plain:
        lines.append(f"crosses without a source: {', '.join(report.plain)}")
    lines += [f"traced by {report.rung}", *report.notes]
    if report.exact is not None:
        equal = "bit for bit" if report.exact else "within rounding"
        lines.append(f"self-check: equal to the model {equal}")
    return lines


def _shortened(names: tuple[str, ...]) -> str:
    """A few names; neighbours that are counted are put together: ``layers.0 to layers.3``."""
    groups: list[list[str]] = []
    for name in names:
        stem, _, last = name.rpartition(".")
        counted = last.isdecimal() and int(last) > 0
        if groups and counted and groups[-1][-1] == f"{stem}.{int(last) - 1}".lstrip("."):
            groups[-1].append(name)
        else:
            groups.append([name])
    texts = [g[0] if len(g) == 1 else f"{g[0]} to {g[-1].rpartition('.')[2]}" for g in groups]
    more = len(texts) - _MOST_NAMES
    return ", ".join(texts[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
