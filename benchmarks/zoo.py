"""How many of the models that people use the transform covers, and whether exact mode equals
backprop on them.

    python benchmarks/zoo.py                        all models, then docs/coverage.md
    python benchmarks/zoo.py --sample 60            60 of them, always the same
    python benchmarks/zoo.py --group transformers   one group, then its part of docs/coverage.md
    python benchmarks/zoo.py --only 'resnet|vit' --list     which models a pattern names
    python benchmarks/zoo.py --resume out/zoo.jsonl         go on where a sweep stopped
    python benchmarks/zoo.py --resume out/zoo.jsonl --retry the same, and once more what missed

Every torchvision model for classification, segmentation and video, one timm model of each family,
on small images, the architectures of transformers that `zoo_transformers` lists and the models of
packages that use einops that `zoo_einops` lists: traced, cut into four stages at equal node counts,
then compared with the model itself, bit for bit, on one thread. Then the search looks for four
stages with measured costs, and its slowest stage is put beside the bound. The models of other
packages (`zoo_packages`) are cut into three stages as their users would have it. Each model has two
processes of its own, one without and one with the transform, and neither has called it before;
results are written as they come.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from pathlib import Path

import torch

from zoo_examining import EQUAL, NOT_ASKED, PARTS, Row, is_miss
from zoo_models import Entry, catalogue, families_without_member
from zoo_page import GROUPS, PAGE, ROOT, page, replace_part
from zoo_sweep import Options, sweep


def progress(row: Row) -> str:
    """One line about one row."""
    if row["status"] in (*NOT_ASKED, "transform"):
        return f"{row['name']}: {row['status']}: {row.get('reason', '').splitlines()[0][:160]}"
    parts = [f"{part} {'equal' if row.get(part) == EQUAL else 'NOT EQUAL'}" for part in PARTS]
    facts = f"{row['rung']}, {row['nodes']} nodes, {row['transform_seconds']:.1f} s"
    return f"{row['name']}: {facts}, {', '.join(parts)}"


def read_rows(path: Path) -> dict[str, Row]:
    """The last row of each model in a file of results."""
    rows = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    return {row["name"]: row for row in rows}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--workers", type=int, default=2, help="processes at a time")
    add("--only", default="", metavar="REGEX", help="models whose name contains a match")
    add("--group", choices=GROUPS, help="models of one group")
    add("--sample", type=int, metavar="N", help="N models, evenly spread over the list")
    add("--list", action="store_true", help="print the models and stop")
    add("--float64", action="store_true", help="double precision instead of single")
    add("--check", action="store_true", help="with the self-check, which may change the rung")
    add("--timeout", type=float, default=180.0, help="seconds for one process")
    add("--memory", type=float, default=12.0, help="GiB of address space for one process")
    add("--resume", type=Path, metavar="FILE", help="keep the results in FILE, add what is missing")
    add("--retry", action="store_true", help="with --resume: once more what missed")
    add("--write", type=Path, metavar="PAGE", help="default: docs/coverage.md, after a full sweep")
    return made


def chosen(everything: list[Entry], arguments: argparse.Namespace) -> list[Entry]:
    """The models that were asked for."""
    entries = [entry for entry in everything if re.search(arguments.only, entry.name)]
    entries = [entry for entry in entries if arguments.group in (None, entry.group)]
    if arguments.sample is not None:
        count = min(arguments.sample, len(entries))
        entries = [entries[index * len(entries) // count] for index in range(count)]
    return entries


def print_list(entries: list[Entry]) -> None:
    """Models with their options, and families of timm that none stands for."""
    for entry in entries:
        print(f"{entry.name}  {entry.group}  {entry.image} px  {entry.options or ''}".rstrip())
    left = ", ".join(families_without_member()) or "none"
    print(f"{len(entries)} models; families of timm without one: {left}")


def run(entries: list[Entry], arguments: argparse.Namespace) -> dict[str, Row]:
    """Examine what is not known yet; the rows by name."""
    name = "zoo64.jsonl" if arguments.float64 else "zoo.jsonl"
    path: Path = arguments.resume or ROOT / "out" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    known = read_rows(path) if arguments.resume and path.exists() else {}
    if not arguments.resume:
        path.write_text("")
    again = {name for name, row in known.items() if arguments.retry and is_miss(row)}
    missing = [entry for entry in entries if entry.name not in known or entry.name in again]
    import dni_fx  # noqa: F401  (children share it)

    dtype = torch.float64 if arguments.float64 else torch.float32
    options = Options(dtype, arguments.check, arguments.timeout, arguments.memory)
    with path.open("a") as file:
        rows = sweep(missing, options, arguments.workers)
        for number, row in enumerate(rows, start=1):
            print(json.dumps(row), file=file, flush=True)
            print(f"[{number}/{len(missing)}] {progress(row)}", flush=True)
            known[row["name"]] = row
    return known


def write(everything: list[Entry], rows: list[Row], arguments: argparse.Namespace) -> None:
    """Write the parts of the page of which every model was examined, or those asked for."""
    target: Path = arguments.write or ROOT / "docs" / "coverage.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = [f"--{flag}" for flag in ("float64", "check") if getattr(arguments, flag)]
    for title, part in PAGE.items():
        found = [row for row in rows if row["group"] in part.groups]
        count = sum(entry.group in part.groups for entry in everything)
        whole = len(found) == count and not arguments.float64
        if whole or (found and arguments.write):
            command = " ".join(["python benchmarks/zoo.py", *flags])
            before = target.read_text() if target.exists() else ""
            target.write_text(replace_part(before, page(title, found, command)))


def main() -> None:
    """Run what was asked for."""
    arguments = parser().parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    everything = catalogue()
    entries = chosen(everything, arguments)
    if arguments.list:
        print_list(entries)
        return
    known = run(entries, arguments)
    ordered = [known[entry.name] for entry in everything if entry.name in known]
    print(f"{len(ordered)} models, {sum(map(is_miss, ordered))} misses")
    write(everything, ordered, arguments)


if __name__ == "__main__":
    main()
