import pytest

from cytoray.io import atomic_path, atomic_write_bytes, atomic_write_text


def test_whole_or_untouched(tmp_path):
    path = tmp_path / "folder" / "a.bin"
    atomic_write_bytes(path, b"one")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            assert path.read_bytes() == b"one"
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert path.read_bytes() == b"one"
    atomic_write_text(path, "zwei")
    assert path.read_text() == "zwei"
    assert list(path.parent.iterdir()) == [path]
