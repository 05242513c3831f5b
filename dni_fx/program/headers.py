"""Files as text: what they import, and which file a class belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from .classes import Classes
from .stages import StageFile
from .text import docstring, wrapped

KIT = "decoupling"  # the file of what is no stage's own

_FROM = {
    "collections.abc": ("Callable", "Iterable", "Iterator", "Sequence"),
    "collections": ("deque",),
    "dataclasses": ("dataclass", "field"),
    "pathlib": ("Path",),
    "queue": ("Empty", "Full", "Queue"),
    "threading": ("Event", "Thread"),
    "types": ("SimpleNamespace",),
    "typing": ("Any",),
}
_PLAIN = ("contextlib", "math", "operator")


def file_text(
    about: str,
    definitions: Sequence[Sequence[str]],
    local: Mapping[str, Sequence[str]],
    extra: Iterable[str],
    modules: Iterable[str] = (),
) -> str:
    """A file.

    Args:
        about: its docstring.
        definitions: lines of classes, functions and constants, in order.
        local: names that are imported from other files of the folder.
        extra: further import lines, of the user's modules.
        modules: files of the folder that are imported as such.
    """
    body = "\n".join(line for lines in definitions for line in lines)
    parts = [docstring(about, ""), [], ["from __future__ import annotations"]]
    standard = [f"import {n}" for n in _PLAIN if _uses(body, f"{n}.")]
    for module, names in sorted(_FROM.items()):
        used = [n for n in names if _uses(body, n)]
        standard += [f"from {module} import {', '.join(used)}"] if used else []
    theirs = ["import torch"] if _uses(body, "torch.") else []
    theirs += ["import torch.nn.functional as F"] if _uses(body, "F.") else []
    used = [n for n in ("Tensor", "nn") if _uses(body, n)]
    theirs += [f"from torch import {', '.join(used)}"] if used else []
    known = {*standard, *theirs}
    theirs = sorted({*extra} - known - {f"import {n}" for n in _PLAIN}, key=_order) + theirs
    theirs = [t for t in theirs if not t.startswith("from types import")]
    ours = [f"import {m}" for m in modules]
    ours += [f"from {m} import {', '.join(sorted(n))}" for m, n in sorted(local.items()) if n]
    for group in (standard, sorted(theirs, key=_order), ours):
        parts += [[], group] if group else []
    lines = [line for part in parts for line in (part or [""])]
    constants = [d for d in definitions if _is_constant(d)]
    text = wrapped(lines)
    for lines_of in constants:
        text += "\n" + wrapped(lines_of)
    for lines_of in (d for d in definitions if not _is_constant(d)):
        text += "\n\n" + wrapped(lines_of)
    return text


def _order(line: str) -> tuple[bool, str]:
    return line.startswith("from "), line.split()[1]


def _is_constant(lines: Sequence[str]) -> bool:
    statement = next(line for line in lines if not line.startswith("#"))
    return not statement.startswith(("def ", "class ", "@", "if "))


def _uses(text: str, name: str) -> bool:
    code = re.sub(r'"""[\s\S]*?"""|"[^"\n]*"', "", text)
    return re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)" if name[-1] != "." else (
        rf"(?<![\w.]){re.escape(name)}"
    ), code) is not None  # fmt: skip


def needed_classes(text: str, classes: Classes) -> list[str]:
    """The classes that a text names."""
    return [n for n in classes.lines if re.search(rf"(?<![\w.]){n}\(", text)]


def home_of(stages: Sequence[StageFile], classes: Classes) -> dict[str, str]:
    """The file that each class belongs to; those that are not used have none."""
    users: dict[str, set[int]] = {}
    for stage in stages:
        pending = ["\n".join(line for lines in stage.lines for line in lines)]
        while pending:
            for name in needed_classes(pending.pop(), classes):
                if stage.index not in users.setdefault(name, set()):
                    users[name].add(stage.index)
                    pending.append("\n".join(classes.named(name)[1:]))
    return {n: f"stage_{next(iter(k))}" if len(k) == 1 else "blocks" for n, k in users.items()}
