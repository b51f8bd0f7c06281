"""What is written to a column comes back; what is cut, replaced or missing does not pass."""

import json

import numpy as np
import pytest

from ernie_jax import columns

ROWS = [np.arange(n, dtype=np.int32) * 7 for n in (3, 0, 5, 1)]
TEXTS = ["zeros", "", "中文 ünï", "zeros around an array"]


def write(directory, rows, dtype=np.uint16, **about):
  with columns.Writer(directory, dtype) as writer:
    for row in rows:
      writer.append(row)
    writer.close(**about)


def test_rows_come_back(tmp_path):
  write(tmp_path / "c", ROWS, fingerprint="a")
  found = columns.matching(tmp_path / "c", fingerprint="a")
  memory = columns.ragged(ROWS)
  assert found.values.dtype == np.uint16
  assert found.lengths.tolist() == memory.lengths.tolist() == [3, 0, 5, 1]
  for i, row in enumerate(ROWS):
    assert found[i].tolist() == memory[i].tolist() == row.tolist()
  assert found.take(np.array([2, 0])).values.tolist() == [*ROWS[2], *ROWS[0]]


@pytest.mark.parametrize("rows", [[], [np.zeros(0, int)]])
def test_nothing_is_a_column_too(tmp_path, rows):
  write(tmp_path / "c", rows)
  assert columns.matching(tmp_path / "c").lengths.tolist() == [0] * len(rows)


def test_other_damaged_or_unfinished_columns_do_not_match(tmp_path):
  place = tmp_path / "c"
  write(place, ROWS, fingerprint="a")
  assert columns.matching(place, fingerprint="b") is None
  for name in ("values.bin", "offsets.npy", "about.json"):
    content = (place / name).read_bytes()
    (place / name).write_bytes(content[: len(content) // 2])
    assert columns.matching(place, fingerprint="a") is None, name
    (place / name).unlink()
    assert columns.matching(place, fingerprint="a") is None, name
    (place / name).write_bytes(content)
  assert columns.matching(place, fingerprint="a") is not None
  with columns.Writer(place, np.uint16) as writer:  # ends without `close`, as after an error
    writer.append(ROWS[0])
  assert [p.name for p in tmp_path.iterdir()] == ["c"]
  assert json.loads((place / "about.json").read_text())["fingerprint"] == "a"


def test_strings(tmp_path):
  write(tmp_path / "s", [text.encode() for text in TEXTS], np.uint8)
  strings = columns.Strings(columns.matching(tmp_path / "s"))
  assert list(strings) == strings[:] == TEXTS
  assert strings[-1] == TEXTS[-1]
  assert strings[1:3] == TEXTS[1:3]
  with pytest.raises(IndexError):
    strings[4]


def test_lookup_finds_rows_even_where_hashes_collide(monkeypatch):
  for spread in (2**64, 3):
    monkeypatch.setattr(columns, "number", lambda text, spread=spread: sum(text.encode()) % spread)
    lookup = columns.Lookup.of(["a", "b", "c", "d", "e"])
    assert lookup(["e", "x", "a", "c", ""]).tolist() == [4, -1, 0, 2, -1]
