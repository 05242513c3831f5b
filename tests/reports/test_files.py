"""Files that are written whole or not at all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dni_fx.errors import DecouplingError
from dni_fx.reports.files import write_atomically


@pytest.mark.parametrize(
    ("content", "found"), [("a\nü\r\n", "a\nü\r\n".encode()), (b"\0\1", b"\0\1")]
)
def test_a_file_is_replaced(content: str | bytes, found: bytes, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("a much longer text of before")
    assert write_atomically(str(path), content) == path
    assert path.read_bytes() == found
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    path = tmp_path / "report.json"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(DecouplingError, match="No space left on device; name another file"):
            write_atomically(path, "the new one")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]
        with pytest.raises(OSError, match="No space"):  # the control: written in place, it is lost
            path.write_bytes(b"the new one")
        assert path.read_bytes() == b"the n"


@pytest.mark.parametrize("place", ["no/such/folder.json", "folder", "file/in a file"])
def test_a_place_that_cannot_be_written_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / place
    with pytest.raises(DecouplingError, match=re.escape(f"cannot write {str(path)!r}: ")):
        write_atomically(path, "")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", tmp_path / "folder"]


def test_a_link_stays_a_link_and_a_file_keeps_its_mode(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    assert write_atomically(link, "new") == link
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640
    assert sorted(tmp_path.iterdir()) == [link, real]
