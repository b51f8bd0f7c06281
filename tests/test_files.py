"""The readers of files: what is in a file comes back whatever it is packed in, and damage is one line."""

import gzip
import itertools
import json
import random
import tracemalloc

import numpy as np
import pytest
import zstandard

from ernie_jax.config import UserError
from ernie_jax.datasets import files, rows
from ernie_jax.datasets.files import Bad

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
LINES = ["plain", "", "tab\tand 中文 ☃", " spaces ", "\x0b\x1c\x85\u2028 end no line", '"quotes"', "last"]


def refusal(read, *args) -> str:
  with pytest.raises(UserError) as error:
    list(read(*args))
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("chunk", [7, 2**20])
def test_lines(tmp_path, monkeypatch, suffix, end, mark, closed, chunk):
  monkeypatch.setattr(files, "CHUNK", chunk)
  path = tmp_path / f"f.txt{suffix}"
  path.write_bytes(PACK[suffix](mark + (end.join(LINES) + (end if closed else "")).encode()))
  assert files.find(tmp_path, "f.txt") == files.need(tmp_path, "g.txt", "f.txt") == path
  assert list(files.lines(path, Bad())) == [(f"{path}:{n}", line) for n, line in enumerate(LINES, 1)]


def test_packed_files_in_several_pieces_are_one(tmp_path):
  for suffix in (".gz", ".zst"):
    path = tmp_path / f"f{suffix}"
    path.write_bytes(PACK[suffix](b"a\nb") + PACK[suffix](b"c\n") + PACK[suffix](b"d"))
    assert [line for _, line in files.lines(path, Bad())] == ["a", "bc", "d"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_or_damaged_packed_file_is_refused_wherever_it_is_cut(tmp_path, suffix):
  rng = random.Random(0)
  content = PACK[suffix]("".join(f"line {rng.random()}\n" for _ in range(2000)).encode())
  path = tmp_path / f"f{suffix}"
  for at in [1, 3, 5, 10, 20, *range(100, len(content), 997), len(content) - 9, len(content) - 1]:
    path.write_bytes(content[:at])
    assert f"{path}: " in refusal(files.lines, path, Bad(100)), at
  path.write_bytes(b"not packed at all\n")
  assert "damaged" in refusal(files.lines, path, Bad(100))


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, suffix, content):
  path = tmp_path / f"f{suffix}"
  path.write_bytes(PACK[suffix](content))
  assert refusal(files.lines, path, Bad(100)) == f"{path}: is empty; at least one line is needed"


def test_what_is_no_file_is_refused(tmp_path):
  (tmp_path / "folder").mkdir()
  assert f"{tmp_path / 'folder'}: is a directory" in refusal(files.lines, tmp_path / "folder", Bad(100))
  assert f"{tmp_path / 'none'}: cannot be read: No such file" in refusal(files.lines, tmp_path / "none", Bad(100))
  assert "no such file (nor with .gz or .zst)" in refusal(files.need, tmp_path, "none")
  assert "no such folder" in refusal(files.need, tmp_path / "none", "f.txt")


def test_a_line_that_is_no_utf8_is_named(tmp_path):
  path = tmp_path / "f"
  path.write_bytes(b"good\ncaf\xe9\ngood\n\xff\n")
  assert f"{path}:2: byte 4 of the line is not UTF-8" in refusal(files.lines, path, Bad())
  bad = Bad(2)
  assert [line for _, line in files.lines(path, bad)] == ["good", "good"]
  assert bad.skipped == {"not UTF-8": 2}
  assert [line for _, line in files.lines(path, bad)] == ["good", "good"]  # read again: not counted again
  assert "after 1 skipped: 1 not UTF-8" in refusal(files.lines, path, Bad(1))


def test_of_a_line_without_end_no_more_than_the_bound_is_held(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "LONGEST", 2**16)
  monkeypatch.setattr(files, "CHUNK", 2**12)
  path = tmp_path / "f.gz"
  path.write_bytes(gzip.compress(b"first\n" + b"x" * 2**25 + b"\nlast\n" + b"y" * 2**16))
  bad = Bad(1)
  tracemalloc.start()
  found = [(where, len(line)) for where, line in files.lines(path, bad)]
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert found == [(f"{path}:1", 5), (f"{path}:3", 4), (f"{path}:4", 2**16)]
  assert bad.skipped == {"line too long": 1}
  assert peak < 2**20
  assert f"{path}:2: more than" in refusal(files.lines, path, Bad())


def test_tsv(tmp_path):
  path = tmp_path / "f.tsv"
  path.write_text('a\tb\n1\t2\n"3\t4"\n5\n6\t7\t8\n9\t\n')
  bad = Bad(2)
  found = [cells for _, cells in files.tsv(path, bad, 2, ("a", "b"))]
  assert found == [["1", "2"], ['"3', '4"'], ["9", ""]]
  assert bad.skipped == {"wrong number of columns": 2}
  assert ":4: 1 columns, not 2" in refusal(files.tsv, path, Bad(), 2)
  assert ":1: the first line must be the header a, c" in refusal(files.tsv, path, Bad(9), [2], ("a", "c"))
  path.write_text("a\tb\n1\t2\na\tb\n")
  assert ":3: the header stands here again" in refusal(files.tsv, path, Bad(), 2, ("a", "b"))
  path.write_text('1\t"a ""b"" c"\tx\n2\t"open\ty\n3\t"closed" more\tz\n4\t"tab\there"\tt\n5\tin"side\tu\n')
  bad = Bad(2)
  found = [cells for _, cells in files.tsv(path, bad, 3, quoted=True)]
  assert found == [["1", 'a "b" c', "x"], ["4", "tab\there", "t"], ["5", 'in"side', "u"]]
  assert bad.skipped == {"wrong quotes": 2}


# ---- JSON ------------------------------------------------------------------------------------------------------------

VALUES = [
  {"a": 'brackets ] } , in a string \\ " \u2028', "中": None},
  {},
  {"n": [1, [2.5, -3e10, {"deep": []}]], "t": True},
  {"long": "x" * 300},
]


@pytest.mark.parametrize("indent", [None, 0, 4])
@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 17, 64, 2**20])
def test_a_json_list_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, indent, ascii, chunk):
  monkeypatch.setattr(files, "CHUNK", chunk)
  path = tmp_path / "f.json"
  content = json.dumps(VALUES, indent=indent, ensure_ascii=ascii)
  for ends in ("", " \r\n\t"):
    path.write_text(f"{ends}{content}{ends}", newline="")
    found = list(files.json_array(path, Bad()))
    assert [value for _, value in found] == VALUES
    numbers = [int(where.split(":")[-2]) for where, _ in found]
    assert [where.split(":")[-1] for where, _ in found] == [f" item {n}" for n in range(1, 5)]
    assert numbers == sorted(numbers)
    assert numbers[0] == 1 + ends.count("\n") + (indent is not None)
  path.write_text(json.dumps({str(i): value for i, value in enumerate(VALUES)}, indent=indent, ensure_ascii=ascii))
  assert [(key, value) for _, key, value in files.json_pairs(path)] == [(str(i), v) for i, v in enumerate(VALUES)]


def test_empty_json(tmp_path):
  path = tmp_path / "f.json"
  path.write_text(" [ ] \n")
  assert list(files.json_array(path, Bad())) == []
  path.write_text("{}")
  assert list(files.json_pairs(path)) == []


def test_a_json_list_cut_anywhere_is_refused(tmp_path):
  path = tmp_path / "f.json"
  content = json.dumps(VALUES, indent=1).encode()
  for at in range(1, len(content)):
    path.write_bytes(content[:at])
    message = refusal(files.json_array, path, Bad(100))
    assert f"{path}:" in message, at


@pytest.mark.parametrize(
  ("content", "says"),
  [
    ('{"a": 1}', ":1: not a JSON list"),
    ("\n[{}\n{}]", ":3: no comma"),
    ("[{},\n\n]", ":3: damaged or cut short: not JSON (Expecting value)"),
    ("[{},]", ":1: damaged or cut short"),
    ('[\n{"a" 1}]', ":2: damaged or cut short: not JSON (Expecting ':' delimiter)"),
    ("[{}]\n[{}]", ":2: text behind the end"),
    ("[" * 100_000, "not JSON"),
    ("[12", ":1: damaged or cut short"),
  ],
)
def test_broken_json_lists_are_named_by_line(tmp_path, content, says):
  path = tmp_path / "f.json"
  path.write_text(content)
  assert f"{path}" in (message := refusal(files.json_array, path, Bad(100)))
  assert says in message


def test_elements_of_a_json_list_that_are_no_objects_are_skipped(tmp_path):
  path = tmp_path / "f.json"
  path.write_bytes(b'[{"a": 1},\n"text",\n{"b": "\xff"},\n3,\n{"c": 2}]')
  bad = Bad(3)
  assert [value for _, value in files.json_array(path, bad)] == [{"a": 1}, {"c": 2}]
  assert bad.skipped == {"not an object": 2, "not UTF-8": 1}
  assert f"{path}:3: " in refusal(files.json_array, path, Bad(1))


def test_a_json_list_takes_no_more_memory_than_an_element(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "CHUNK", 2**14)
  path = tmp_path / "f.json"
  with open(path, "w") as file:
    file.write("[" + ",\n".join(json.dumps({"n": n, "text": "x" * 1000}) for n in range(20_000)) + "]")
  tracemalloc.start()
  count = sum(found["n"] == n for n, (_, found) in enumerate(files.json_array(path, Bad())))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert count == 20_000
  assert peak < 2**20


def test_an_element_beyond_the_bound_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "LONGEST", 1000)
  monkeypatch.setattr(files, "CHUNK", 100)
  path = tmp_path / "f.json"
  path.write_text(json.dumps([{"a": "x" * 5000}]))
  assert "more than 1000 characters" in refusal(files.json_array, path, Bad(100))


def test_elements_on_one_line_are_counted_one_by_one(tmp_path):
  path = tmp_path / "f.json"
  path.write_text(json.dumps([1, {"a": 1}, 2, {"b": 1}, 3]))
  bad = files.Bad(2)
  found = files.json_array(path, bad)
  assert [element for _, element in (next(found), next(found))] == [{"a": 1}, {"b": 1}]
  assert bad.skipped == {"not an object": 2}
  with pytest.raises(UserError, match=r"f.json:1: item 5: a JSON int"):
    next(found)


def test_json_documents(tmp_path):
  path = tmp_path / "f.json"
  path.write_bytes(b'\xef\xbb\xbf{"a":\n[1]}')
  assert files.json_document(path) == {"a": [1]}
  for content, says in ((b"{\n1}", ":2: not JSON"), (b'{\n\n"\xff"}', ":3: byte 5"), (b"[" * 100_000, "not JSON")):
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
      files.json_document(path)
    assert says in str(error.value)


# ---- Names -----------------------------------------------------------------------------------------------------------


def test_the_signature_of_a_large_file(tmp_path, monkeypatch):
  """Content, for small files; size, time, beginning and end for large ones."""
  import os

  monkeypatch.setattr(files, "SMALL", 100)
  monkeypatch.setattr(files, "CHUNK", 10)
  path = tmp_path / "f"

  def signed(content: bytes, time: int = 0) -> str:
    path.write_bytes(content)
    os.utime(path, (time, time))
    return files.signature([path], "v1")

  assert signed(b"a" * 100) == signed(b"a" * 100, 5) != signed(b"a" * 99 + b"b")
  large = b"a" * 200
  names = [signed(large), signed(large, 5), signed(large + b"a"), signed(b"b" + large[1:]), signed(large[:-1] + b"b")]
  assert len({*names, signed(b"a" * 100)}) == 6
  assert signed(large) == names[0]
  assert files.signature([path], "v2") != names[0]


# ---- Hashes and duplicates -------------------------------------------------------------------------------------------


def test_hashes_find_what_was_added():
  rng = np.random.default_rng(0)
  given = rng.integers(0, 3000, 5000).astype(np.uint64)  # with repetitions
  tree = rows.Hashes()
  start = 0
  for size in itertools.cycle([1, 7, 64, 300, 2]):
    part = given[start : start + size]
    tree.add(part, np.arange(start, start + len(part)))
    start += len(part)
    if start >= len(given):
      break
  assert len(tree.blocks) < 14  # about log2(5000)
  wanted = np.arange(3500, dtype=np.uint64)
  found = tree.find(wanted)
  for value in wanted.tolist():
    assert sorted(found.get(value, [])) == np.flatnonzero(given == value).tolist()
  hashes, order = tree.whole()
  np.testing.assert_array_equal(given[order], hashes)
  assert (np.diff(hashes.astype(np.int64)) >= 0).all()


def test_identities_tell_equal_halves_apart():
  contents = np.array([[5, 1], [3, 3], [5, 2], [5, 1], [3, 3], [9, 9], [5, 2]], np.uint64)
  identity, halves, order = rows.identities(contents)
  assert identity.tolist() == [0, 1, 2, 0, 1, 5, 2]
  assert halves.tolist() == contents[order, 0].tolist() == sorted(contents[:, 0].tolist())
  assert rows.identities(np.zeros((0, 2), np.uint64))[0].tolist() == []


def test_ids_whose_hashes_collide_are_told_apart(tmp_path, monkeypatch):
  monkeypatch.setattr(rows.columns, "number", lambda text: len(text) % 2)
  given = [rows.Row(f"p{i}", "", f"text {i // 2}") for i in range(40)]
  given += [rows.Row("p7", "", "text 3"), rows.Row("p8", "", "text of another")]
  bad = Bad(1)
  for size in (1, 4, 100):
    monkeypatch.setattr(rows, "BLOCK", size)
    index = rows.Index(tmp_path / str(size), bad)
    assert list(index("corpus", given)) == given[:40]
    assert index.identity.tolist() == [i // 2 * 2 for i in range(40)]
    assert index.lookup([f"p{i}" for i in range(45)]).tolist() == [*range(40), *[-1] * 5]
    assert bad.skipped == {"duplicate id": 1}


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3])
def test_carving_hangs_on_the_names_alone(part):
  names = [f"q{i}" for i in range(2000)]
  chosen = rows.carve(names, part)
  assert chosen == rows.carve(reversed(names), part)
  assert 1 <= len(chosen) <= 1.5 * part * len(names) + 1
  assert len(chosen ^ rows.carve([*names, "another"], part)) <= 2
  assert rows.carve([], part) == rows.carve(names[:1], part) == set()
  assert all(len(rows.carve([name, "q1040"], part)) == 1 for name in names[:100])


@pytest.mark.parametrize(
  ("row", "kind"),
  [
    (rows.Row("", "", "text"), "empty id"),
    (rows.Row("a b", "", "text"), "white space in an id"),
    (rows.Row("a\u2003", "", "text"), "white space in an id"),
    (rows.Row("a", "", " \n"), "empty text"),
    (rows.Row("a", "", "\ud800"), "not Unicode"),
    (rows.Row("a", "\udcff", "text"), "not Unicode"),
  ],
)
def test_what_no_row_may_be(tmp_path, row, kind):
  bad = Bad(1)
  index = rows.Index(tmp_path, bad)
  assert list(index("corpus", [rows.Row("p", "", "good"), row._replace(where="f:2")])) == [rows.Row("p", "", "good")]
  query = row._replace(positives=("p",), where="g:1")
  with pytest.raises(UserError, match=f"g:1: .*after 1 skipped: 1 {kind}"):
    list(index("train", [query]))


@pytest.mark.parametrize(
  ("more", "kind"),
  [
    ({"positives": ()}, "query without positives"),
    ({"positives": ("p", "x")}, "unknown passage"),
    ({"negatives": ("x",)}, "unknown passage"),
    ({"negatives": (rows.said("", "other"),)}, "unknown passage"),
    ({"positives": ("\ud800",)}, "not Unicode"),
  ],
)
def test_what_no_query_may_be(tmp_path, more, kind):
  good = rows.Row("q", "", "query", ("p", rows.said("", "good"), "p"), ("p", rows.said("t", "better")))
  bad = Bad(1)
  index = rows.Index(tmp_path, bad)
  assert len(list(index("corpus", [rows.Row("p", "", "good"), rows.Row("o", "t", "better")]))) == 2
  found = list(index("train", [good, good._replace(id="r", **more)]))
  assert found == [good._replace(positives=("p",), negatives=("o",))]
  assert bad.skipped == {kind: 1}
  with pytest.raises(UserError):
    list(index("dev", [good, good._replace(text="another", where="x")]))
