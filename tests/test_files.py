from __future__ import annotations

from pathlib import Path

import pytest

from sr_dist import files
from tests.runs import full_disk


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    files.write_whole(path, "größer")
    assert path.read_bytes() == "größer".encode()
    with full_disk(1000), pytest.raises(OSError, match="File too large: .*a.txt"):
        files.write_whole(path, bytes(2000))
    assert path.read_text(encoding="utf-8") == "größer"
    assert [each.name for each in path.parent.iterdir()] == ["a.txt"]
    longest = tmp_path / ("x" * 255)
    files.write_whole(longest, b"1")
    with pytest.raises(OSError, match="source"), files.whole(longest):
        raise OSError(5, "Input/output error", "source")
    assert longest.read_bytes() == b"1"
