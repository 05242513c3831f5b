"""The page of coverage, written from a sweep's rows."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import zoo_einops
import zoo_package_tables
import zoo_packages
import zoo_transformers
from zoo_comparing import BATCH, SEED, STEPS
from zoo_examining import EQUAL, LARGEST, NOT_ASKED, PARTS, Row, is_miss
from zoo_models import IMAGE, SIZES, VIDEO_IMAGE

ROOT = Path(__file__).resolve().parent.parent

_IMAGES = f", images of {IMAGE} and clips of {VIDEO_IMAGE} pixels unless the table says otherwise"
_MEASURES = {
    "in as many stages as asked for": "split",
    "the model trains afterwards as without the transform": "after",
    "model, inputs, random states and caches are as before the transform": "unharmed",
    "exact mode equals backprop, bit for bit": "exact",
    "composed stages equal the model, training": "train",
    "composed stages equal the model, evaluation": "eval",
    "the drop-in module equals the model, training": "module",
    "a step without gradients across the cuts": "zero",
}
_COLUMNS = (
    "model | pixels | nodes | rung | interfaces | implied | " + " | ".join(PARTS) + " | "
    "transform, s | slowest, ms | bound, ms | gap | of all | of the net | best of | notes"
)


@dataclass(frozen=True)
class Part:
    """A part of the page, under a title of its own."""

    groups: tuple[str, ...]
    libraries: tuple[str, ...]
    inputs: str = ""
    introduction: str = ""
    sizes: bool = False  # whether image sizes are listed
    stages: int = 4
    cuts: str = "at equal node counts"


PAGE = {
    "# Coverage": Part(
        ("classification", "segmentation", "video", "timm"),
        ("torchvision", "timm"),
        inputs=_IMAGES,
        sizes=True,
    ),
    "# transformers": Part(
        ("transformers",), ("transformers",), introduction=zoo_transformers.INTRODUCTION
    ),
    "# Packages that use einops": Part(
        ("einops",),
        ("einops", "vit-pytorch", "x-transformers"),
        introduction=zoo_einops.INTRODUCTION,
    ),
    "# Other people's packages": Part(
        ("packages",),
        tuple(sorted({name.partition("/")[0] for name in zoo_package_tables.TABLE})),
        introduction=zoo_packages.INTRODUCTION,
        stages=3,
        cuts="where the default search cuts, with the self-check",
    ),
}
GROUPS = tuple(group for part in PAGE.values() for group in part.groups)


def replace_part(page: str, part: str) -> str:
    """The page with the part of that title written anew; the other parts stay as they are."""
    found = {text.partition("\n")[0]: text for text in [*re.split(r"(?m)^(?=# )", page), part]}
    return "\n".join(found[title].rstrip("\n") + "\n" for title in PAGE if title in found)


def page(title: str, rows: list[Row], command: str) -> str:
    """One part of the page of coverage as Markdown."""
    part = PAGE[title]
    asked = [row for row in rows if row["status"] not in NOT_ASKED]
    text = [title, "", f"Written by `{command}`. Do not edit.", ""]
    text += _introduction(part, asked)
    text += _counts(part, asked)
    text += _search_summary(part.stages, [row for row in asked if "gap" in row])
    text += _misses([row for row in rows if is_miss(row)])
    text += _unsteady([row for row in asked if row.get("repeatable", EQUAL) != EQUAL])
    text += _outside([row for row in rows if row["status"] in NOT_ASKED])
    if part.sizes:
        text += ["", "## Image sizes", ""]
        text += [f"* {image} pixels for `{pattern}`: {reason}" for pattern, image, reason in SIZES]
    text += ["", "## Every model", "", f"| {_COLUMNS} |"]
    text += ["| --- | ---: | ---: | --- | ---: | ---: |" + " --- |" * len(PARTS) + " ---: |" * 6]
    text[-1] += " --- | --- |"
    text += [_table_row(part.stages, row) for row in asked]
    return "\n".join(text) + "\n"


def _introduction(part: Part, asked: list[Row]) -> list[str]:
    dtypes = sorted({row["dtype"] for row in asked if "dtype" in row})
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in part.libraries)
    return [
        f"Each model is traced in a process in which nothing has called it, cut into "
        f"{part.stages} stages {part.cuts}, and compared with itself: values, storages, gradients "
        "and attributes of the model, its inputs, random states and the caches of its package "
        "with what they were before; training afterwards with training in a process without the "
        "transform; the composed stages in training and in evaluation mode (outputs, every "
        "gradient, buffers; evaluation with another batch size than the example's); the drop-in "
        "module in training mode; the outputs of a step with the source `zero`, and a step with "
        f"another batch size; and {STEPS} steps of SGD with momentum in exact mode against "
        "backprop (outputs, all gradients, buffers and, at the end, parameters). Equal means "
        "every bit. No trained weights; parameters that start constant get noise, so that no "
        "branch is multiplied by zero.",
        "",
        f"Seed {SEED}, {', '.join(dtypes)}, batch {BATCH}{part.inputs}, one thread. Python "
        f"{platform.python_version()}, torch {torch.__version__}, {versions}.",
        "",
        *([part.introduction, ""] if part.introduction else []),
    ]


def _counts(part: Part, asked: list[Row]) -> list[str]:
    groups = part.groups if len(part.groups) > 1 else ()
    traced = [row for row in asked if "rung" in row]
    measures: dict[str, list[Row]] = {"models": asked, "traced and split": traced}
    for rung, _ in Counter(row["rung"] for row in traced).most_common():
        measures[f"by {rung}"] = [row for row in traced if row["rung"] == rung]
    for words, name in _MEASURES.items():
        measures[words] = [row for row in asked if row.get(name) == EQUAL]
    text = [
        " | ".join(["| | all", *groups]) + " |",
        "| --- | ---: |" + " ---: |" * len(groups),
    ]
    for words, members in measures.items():
        counts = Counter(row["group"] for row in members)
        cells = [f"| {words}", str(len(members)), *(str(counts[group]) for group in groups)]
        text.append(" | ".join(cells) + " |")
    return text


def _misses(rows: list[Row]) -> list[str]:
    text = ["", f"## Misses: {len(rows)}", ""]
    if rows:
        text += ["| model | what | why |", "| --- | --- | --- |"]
    for row in rows:
        reasons = {"traced and split": row["reason"]} if row["status"] == "transform" else {}
        reasons |= {"search": row["search"]} if "search" in row else {}
        reasons |= {part: row[part] for part in PARTS if row.get(part, EQUAL) != EQUAL}
        text += [f"| {row['name']} | {part} | {_cell(why)} |" for part, why in reasons.items()]
    return text


def _unsteady(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    text = ["", "## Eager differs from itself", ""]
    text += ["Two runs of backprop from one seed are not equal:", ""]
    return text + [f"* {row['name']}: {_cell(row['repeatable'])}" for row in rows]


def _outside(rows: list[Row]) -> list[str]:
    text = ["", f"## Not asked of the transform: {len(rows)}", ""]
    if rows:
        limit = f"Over {LARGEST // 10**6} M parameters"
        text += [f"{limit}, or the model's own training step fails.", ""]
    return text + [
        f"* {row['name']} ({row['status']}): {_cell(row.get('reason', ''))}" for row in rows
    ]


def _search_summary(stages: int, rows: list[Row]) -> list[str]:
    """What the search found over all models."""
    if not rows:
        return []
    median = lambda name: statistics.median(row[name] for row in rows)  # noqa: E731
    sure = Counter(row["sure"] or "not sure" for row in rows)
    return [
        "", "## The cuts that the search finds", "",
        f"{stages} stages with measured costs, the sources that `gradients=\"auto\"` puts there "
        f"included. Over {len(rows)} models: median gap to the bound {median('gap'):.1%}, largest "
        f"{max(row['gap'] for row in rows):.1%}; the slowest stage has {median('share'):.1%} of "
        f"all work of the stages, sources included (median), or {median('net'):.0%} of what the "
        "network alone takes. The search was exact over "
        + ", ".join(f"{name} ({count} models)" for name, count in sure.most_common())
        + f". {sum(row['free'] for row in rows)} plans have stages that are not contiguous in "
        "program order. Tracing, measuring and search take "
        f"{median('plan_seconds'):.1f} s (median).",
    ]  # fmt: skip


def _cell(text: str) -> str:
    first, *others = text.strip().splitlines() or [""]
    if first.endswith(":") and others:
        first = f"{first} {others[0].strip(' -')}"
    return (
        re.sub(r"/[^\s'\"(]*/site-packages/", "", first)
        .replace(f"{ROOT}/", "")
        .replace("|", "\\|")[:300]
    )


def _summary(notes: list[str]) -> list[str]:
    """The notes, with one line for all opaque modules."""
    opaque = [note for note in notes if "is one opaque node" in note]
    if len(opaque) > 1:
        opaque = [f"{opaque[0]} (and {len(opaque) - 1} more opaque)"]
    return opaque + [note for note in notes if "is one opaque node" not in note]


def _table_row(stages: int, row: Row) -> str:
    marks = ["yes" if row.get(part) == EQUAL else "no" for part in PARTS]
    notes = _summary(row.get("notes", []))
    if not row.get("finite", True):
        notes.append("eager itself is not finite")
    if row.get("stages", stages) != stages:
        notes.append(f"{row['stages']} stages")
    seconds = f"{row['transform_seconds']:.1f}" if "transform_seconds" in row else ""
    cells = [row["name"], row.get("image") or "", row.get("nodes", ""), row.get("rung", "none")]
    cells += [row.get("interfaces", ""), row.get("implied", ""), *marks, seconds]
    if "gap" in row:
        cells += [f"{row['slowest'] * 1e3:.1f}", f"{row['bound'] * 1e3:.1f}", f"{row['gap']:.1%}"]
        cells += [f"{row['share']:.1%}", f"{row['net']:.0%}", row["sure"]]
    else:
        cells += [""] * 6
    cells.append(_cell("; ".join(notes).replace("\n", " ")))
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
