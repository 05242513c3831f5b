"""fx plumbing that several passes use."""

from __future__ import annotations

import keyword


def identifier(name: str) -> str:
    """A value's name as a Python name: dots and slashes become underscores."""
    text = "".join(c if c.isalnum() else "_" for c in name)
    return f"_{text}" if text[0].isdigit() or keyword.iskeyword(text) else text
