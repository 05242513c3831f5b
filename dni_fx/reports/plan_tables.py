"""A plan's report in words: rows of its tables, and notes."""

from __future__ import annotations

from .plans import Interface, PlanReport, SearchReport, SourceReport, StageReport

_MOST_NAMES = 4  # modules that are named of a stage


def stage_rows(report: PlanReport) -> list[tuple[str, ...]]:
    """A row for each stage, below the titles; seconds and bytes where all stages have costs."""
    costs = [stage.cost for stage in report.stages]
    measured = all(cost is not None for cost in costs)
    seconds = sum(cost.seconds for cost in costs if cost is not None) or 1.0
    nodes = sum(stage.nodes for stage in report.stages) or 1
    titles = ["time", "ms", "MB"] if measured else ["share"]
    rows: list[tuple[str, ...]] = [("stage", "nodes", *titles, "parameters", "ends after", "holds")]
    for stage in report.stages:
        share = _cost_cells(stage, seconds) if measured else [f"{stage.nodes / nodes:.0%}"]
        end = stage.cut or "(output)"
        parameters = f"{stage.parameters:,}"
        holds = _shortened(stage.modules)
        rows.append((stage.name, str(stage.nodes), *share, parameters, end, holds))
    return rows


def _cost_cells(stage: StageReport, seconds: float) -> list[str]:
    """Share of all stages' seconds, milliseconds, megabytes."""
    cost = stage.cost
    if cost is None:
        return []
    share = f"{cost.seconds / seconds:.0%}"
    return [share, f"{cost.seconds * 1e3:.2f}", f"{cost.nbytes / 1e6:.1f}"]


def interface_rows(report: PlanReport) -> list[tuple[str, ...]]:
    """A row for each interface and its source, below the titles."""
    measured = any(source.seconds is not None for source in report.sources.values())
    places = ("interface", "shape", "MB", "from", "to")
    rows: list[tuple[str, ...]] = [
        (*places, "source", "parameters", "MFLOP", "ms" if measured else "", "")
    ]
    for interface in report.interfaces:
        source = report.sources.get(interface.name, SourceReport("-", 0, 0))
        shape = " x ".join(str(size) for size in interface.spec.shape)
        size = f"{interface.spec.nbytes / 1e6:.2f}"
        implied = "implied" if interface.implied else ""
        way = (str(interface.producer), _goal(interface))
        rows.append((interface.name, shape, size, *way, *_source_cells(source), implied))
    return rows


def _goal(interface: Interface) -> str:
    stages = ", ".join(str(stage) for stage in interface.consumers)
    if interface.feeds is None or not stages:
        return interface.feeds or stages
    return f"{stages} of the next window"


def _source_cells(source: SourceReport) -> tuple[str, ...]:
    """Kind, parameters, MFLOP, milliseconds."""
    flops = "?" if source.flops is None else f"{source.flops / 1e6:.1f}"
    seconds = "" if source.seconds is None else f"{source.seconds * 1e3:.2f}"
    return source.kind, f"{source.parameters:,}", flops, seconds


def notes(report: PlanReport) -> list[str]:
    """What a plan has to say besides its tables."""
    lines = [] if report.search is None else _search_notes(report.search)
    if report.plain:
        lines.append(f"crosses without a source: {', '.join(report.plain)}")
    lines += [f"traced by {report.rung}", *report.notes]
    if report.exact is not None:
        equal = "bit for bit" if report.exact else "within rounding"
        lines.append(f"self-check: equal to the model {equal}")
    return lines


def _search_notes(search: SearchReport) -> list[str]:
    sure = f"; exact over {search.exact}" if search.exact else ""
    found = (
        f"found for {search.objective} with {search.costs} costs: slowest stage "
        f"{search.slowest * 1e3:.2f} ms, sources and transfers included; bound "
        f"{search.bound * 1e3:.2f} ms, gap {search.gap:.1%}{sure}"
    )
    return [found, *(f"cut after {name}: {why}" for name, why in search.reasons.items())]


def _shortened(names: tuple[str, ...]) -> str:
    """A few names; neighbours that are counted are put together: ``layers.0 to layers.3``."""
    groups: list[list[str]] = []
    for name in names:
        if groups and _is_next(groups[-1][-1], name):
            groups[-1].append(name)
        else:
            groups.append([name])
    texts = [g[0] if len(g) == 1 else f"{g[0]} to {g[-1].rpartition('.')[2]}" for g in groups]
    more = len(texts) - _MOST_NAMES
    return ", ".join(texts[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _is_next(before: str, name: str) -> bool:
    """Whether a path counts on from another: ``layers.1`` from ``layers.0``."""
    stem, _, last = name.rpartition(".")
    earlier, _, number = before.rpartition(".")
    counted = last.isdigit() and number.isdigit()
    return counted and (stem, int(last)) == (earlier, int(number) + 1)
