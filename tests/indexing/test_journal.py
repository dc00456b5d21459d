from __future__ import annotations

import pytest

from cytoray.indexing.journal import Journal

KEY = {"settings": {"a": 1, "b": [0.5, None]}, "file": (10, 20)}


def fill(path, number: int = 3) -> bytes:
    journal = Journal(path, KEY)
    for i in range(number):
        journal.append({"piece": i}, bytes([i]) * (i + 1))
    journal.close()
    return path.read_bytes()


def test_records_come_back_in_order(tmp_path) -> None:
    path = tmp_path / "folder" / "x.journal"
    fill(path)
    again = Journal(path, KEY)
    assert again.records == [({"piece": i}, bytes([i]) * (i + 1)) for i in range(3)]
    again.append({"piece": 3})
    again.close()
    assert [values["piece"] for values, _ in Journal(path, KEY).records] == [0, 1, 2, 3]


def test_another_key_starts_anew(tmp_path) -> None:
    fill(tmp_path / "x")
    assert Journal(tmp_path / "x", KEY | {"file": (10, 21)}).records == []
    assert Journal(tmp_path / "x", KEY).records == []  # the other key's journal took its place


def test_wherever_the_file_is_cut_whole_records_stay(tmp_path) -> None:
    path = tmp_path / "x"
    data = fill(path)
    seen = set()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        journal = Journal(path, KEY)
        count = len(journal.records)
        assert journal.records == [({"piece": i}, bytes([i]) * (i + 1)) for i in range(count)]
        journal.append({"piece": "new"}, b"xyz")
        journal.close()
        assert Journal(path, KEY).records[count:] == [({"piece": "new"}, b"xyz")]
        seen.add(count)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("record", [0, 1, 2])
def test_a_damaged_record_ends_the_journal(tmp_path, record) -> None:
    path = tmp_path / "x"
    data = bytearray(fill(path))
    data[data.index(b'{"piece": %d}' % record) + 2] ^= 1
    path.write_bytes(bytes(data))
    assert [values["piece"] for values, _ in Journal(path, KEY).records] == list(range(record))


def test_a_removed_journal_is_gone(tmp_path) -> None:
    fill(tmp_path / "x")
    Journal(tmp_path / "x", KEY).remove()
    assert not (tmp_path / "x").exists()
