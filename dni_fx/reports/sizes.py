"""Numbers of bytes in words, both ways."""

from __future__ import annotations

import math
import re

_PREFIXES = "kMGT"
UNITS = {"": 1, "B": 1} | {p + "B": 1000**i for i, p in enumerate(_PREFIXES, 1)}
UNITS |= {p + "iB": 1024**i for i, p in enumerate("KMGT", 1)}


def parse_size(text: str) -> int:
    """A number of bytes, from ``500000000``, ``500MB`` or ``2GiB``.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?) ?([a-zA-Z]*)", text, re.ASCII)
    if match is None or match[2] not in UNITS or not float(match[1]) * UNITS[match[2]] >= 1:
        raise ValueError(f"{text!r}: expected bytes, such as 500000000, 500MB or 2GiB")
    return int(float(match[1]) * UNITS[match[2]])


def show_size(count: float, *, up: bool = False) -> str:
    """Bytes with three digits; ``up`` where fewer would not do."""
    units = (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")
    unit, name = next((u, n) for u, n in units if count >= u or u == 1)
    number = count / unit
    digits = 0 if number >= 100 or unit == 1 else 1 if number >= 10 else 2
    if up:
        number = math.ceil(number * 10**digits) / 10**digits
    return f"{number:.{digits}f} {name}"
