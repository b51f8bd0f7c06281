"""The files that data sets come as: opened, decompressed and cut into lines or JSON values, in bounded memory.

Every value comes with where it stood ("file:line"). Damage to a line goes to the tally `Bad`, which skips as many
lines as the user allows; damage to a whole file (cut, empty, not there) always ends in a `UserError`.
"""

from __future__ import annotations

import codecs
import collections
import csv
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ernie_jax.config import UserError, first_line

LONGEST = 10 * 2**20  # bytes of a line, characters of an element of a JSON list: more is never held in memory
SUFFIXES = ("", ".gz", ".zst")
SMALL = 64 * 2**20  # files up to this size are named by their content
CHUNK = 2**20


class Bad:
  """Tally of bad lines: up to `limit` are skipped and counted by kind, the next one is a `UserError`."""

  def __init__(self, limit: int = 0):
    self.limit = limit
    self.skipped: collections.Counter[str] = collections.Counter()
    self.left_out: collections.Counter[str] = collections.Counter()  # not bad, and not wanted: counted by the sources
    self.places: set[str] = set()

  def __call__(self, kind: str, where: str, text: str) -> None:
    """Counts a bad line, whose reader then goes on; a file that is read twice has its bad lines counted once."""
    if where in self.places:
      return
    if len(self.places) >= self.limit:
      after = f" (after {len(self.places)} skipped: {self})" if self.places else ""
      raise UserError(f"{where}: {text}; --skip-bad N (data.skip_bad) leaves out up to N bad lines{after}")
    self.places.add(where)
    self.skipped[kind] += 1

  def __str__(self) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in self.skipped.items())


# ---- Which files ---------------------------------------------------------------------------------------------------


def find(folder: Path, *names: str) -> Path | None:
  """The first of the names that is there, as it is or with .gz or .zst; whether it is a file shows when it is read."""
  return next((p for name in names for suffix in SUFFIXES if (p := folder / (name + suffix)).exists()), None)


def need(folder: Path, *names: str) -> Path:
  """As `find`; a `UserError` if there is none."""
  if not folder.is_dir():
    raise UserError(f"data.folder={str(folder)!r}: no such folder; name the one with {names[0]}")
  if (path := find(folder, *names)) is None:
    raise UserError(f"{folder / names[0]}: no such file (nor with .gz or .zst); data.folder needs {' or '.join(names)}")
  return path


def signature(paths: Sequence[Path], *parts: object) -> str:
  """16 hex digits that name files as they are now, and `parts`: a changed file makes another name.

  A file of up to `SMALL` bytes counts by its name and content; to read 30 GB only for their name would take minutes, so
  a larger one counts by name, size, time of change, and its first and last megabyte.
  """
  digest = hashlib.sha256(repr(parts).encode())
  for path in paths:
    try:
      about = path.stat()
      with open(path, "rb") as file:
        digest.update(repr((path.name, about.st_size)).encode())
        if about.st_size <= SMALL:
          digest.update(file.read())
          continue
        digest.update(repr(about.st_mtime_ns).encode() + file.read(CHUNK))
        file.seek(-CHUNK, 2)
        digest.update(file.read())
    except OSError as error:
      raise _cannot(path, error) from error
  return digest.hexdigest()[:16]


def _cannot(path: Path, error: OSError) -> UserError:
  what = "is a directory" if isinstance(error, IsADirectoryError) else f"cannot be read: {error.strerror or error}"
  return UserError(f"{path}: {what}; a file is needed here")


# ---- Bytes ---------------------------------------------------------------------------------------------------------


def _unpacked(path: Path, file: BinaryIO) -> Iterator[bytes]:
  if path.suffix == ".gz":
    with gzip.open(file) as unpacked:
      while chunk := unpacked.read(CHUNK):
        yield chunk
  elif path.suffix == ".zst":
    import zstandard

    # zstandard's reader of streams takes a cut file for a whole one: only this object says whether a frame ended.
    # It has no bound on what it gives at once, hence the small pieces.
    frame = zstandard.ZstdDecompressor().decompressobj()
    begun = False
    while piece := file.read(2**13):
      while piece:
        if frame.eof:
          frame = zstandard.ZstdDecompressor().decompressobj()
        chunk, begun = frame.decompress(piece), True
        piece = frame.unused_data if frame.eof else b""
        if chunk:
          yield chunk
    if begun and not frame.eof:
      raise EOFError("the last frame does not end")
  else:
    while chunk := file.read(CHUNK):
      yield chunk


def chunks(path: Path) -> Iterator[bytes]:
  """A file's content in pieces, unpacked, without a byte order mark; `UserError` if it is damaged or empty."""
  import zstandard

  size = 0
  try:
    with open(path, "rb") as file:
      for chunk in _unpacked(path, file):
        # A first piece of less than three bytes is one of a file of less than three bytes, or of an odd zstd frame.
        content = chunk if size else chunk.removeprefix(codecs.BOM_UTF8)
        size += len(content)
        if content:
          yield content
  except OSError as error:
    if isinstance(error, gzip.BadGzipFile):
      raise UserError(f"{path}: damaged ({first_line(error)}); get or make the file again") from error
    raise _cannot(path, error) from error
  except (EOFError, zlib.error, zstandard.ZstdError) as error:
    raise UserError(f"{path}: damaged or cut short ({first_line(error)}); get or make the file again") from error
  if not size:
    raise UserError(f"{path}: is empty; at least one line is needed")


# ---- Lines ---------------------------------------------------------------------------------------------------------


def lines(path: Path, bad: Bad) -> Iterator[tuple[str, str]]:
  """(where, line without its end) of a UTF-8 text file, whose lines end in LF or CR LF."""
  number = 1
  rest = b""
  long = False  # inside a line of which too much was read already

  def decode(line: bytes) -> Iterator[tuple[str, str]]:
    where = f"{path}:{number}"
    if long or len(line) > LONGEST:
      bad("line too long", where, f"more than {LONGEST} bytes in a line; is this the right file?")
      return
    try:
      yield where, line.removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
      bad("not UTF-8", where, f"byte {error.start + 1} of the line is not UTF-8; convert the file")

  for chunk in chunks(path):
    *whole, rest = (rest + chunk).split(b"\n")
    for line in whole:
      yield from decode(line)
      number, long = number + 1, False
    if len(rest) > LONGEST:
      rest, long = b"", True
  if rest or long:
    yield from decode(rest)


def tsv(
  path: Path, bad: Bad, columns: int, header: Sequence[str] = (), quoted: bool = False
) -> Iterator[tuple[str, list[str]]]:
  """(where, cells) of lines of so many tab-separated columns.

  A `header` is the first line, and left out: without it, the order of columns would be a guess. `quoted`: cells may
  stand in double quotes, doubled inside, as `csv` has them; a cell ends on its line.
  """
  csv.field_size_limit(LONGEST)
  for number, (where, line) in enumerate(lines(path, bad)):
    cells = line.split("\t")
    if quoted and '"' in line:
      try:
        cells = next(csv.reader([line], delimiter="\t", strict=True))
      except csv.Error as error:
        bad("wrong quotes", where, f"not a line of csv ({error}); double the quotes inside a quoted cell")
        continue
    if number == 0 and header and cells != list(header):
      raise UserError(f"{where}: the first line must be the header {', '.join(header)}, separated by tabs; add it")
    if cells == list(header):
      if number:
        bad("header inside the file", where, "the header stands here again; take this line out")
      continue
    if len(cells) != columns:
      bad("wrong number of columns", where, f"{len(cells)} columns, not {columns}; separate them by tabs")
      continue
    yield where, cells


def json_lines(path: Path, bad: Bad) -> Iterator[tuple[str, dict[str, Any]]]:
  """(where, object) of a file with a JSON object on each line."""
  for where, line in lines(path, bad):
    try:
      found = json.loads(line)
    except (ValueError, RecursionError) as error:
      bad("not JSON", where, f"not a JSON object ({first_line(error)}); one object a line is needed")
      continue
    if isinstance(found, dict):
      yield where, found
    else:
      bad("not an object", where, f"a JSON {type(found).__name__}, not an object; one object a line is needed")


# ---- JSON over many lines ------------------------------------------------------------------------------------------

_decode = json.JSONDecoder().raw_decode
_SPACE = re.compile(r"[ \t\n\r]*")


class _Text:
  """The part of a file that is being read: `rest[at:]` is what comes next, on line `line`."""

  def __init__(self, path: Path):
    self.path = path
    # Bytes that are no UTF-8 stay recognisable, so that an element which holds them can be named, and left out.
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    self.chunks = (decoder.decode(chunk) for chunk in chunks(path))
    self.rest, self.at, self.line = "", 0, 1

  def more(self) -> bool:
    """Reads on; whether there was anything."""
    chunk = next(self.chunks, None)
    self.rest, self.at = self.rest[self.at :] + (chunk or ""), 0
    return chunk is not None

  def move(self, to: int) -> None:
    self.line += self.rest.count("\n", self.at, to)
    self.at = to

  def peek(self) -> str:
    """The next character that is no white space; "" at the end of the file."""
    while True:
      space = _SPACE.match(self.rest, self.at)
      assert space is not None
      self.move(space.end())
      if self.at < len(self.rest):
        return self.rest[self.at]
      if not self.more():
        return ""


def _broken(text: _Text, what: str) -> UserError:
  return UserError(f"{text.path}:{text.line}: {what}; get or make the file again")


def _value(text: _Text) -> tuple[Any, str]:
  """The next JSON value, and how it was written."""
  text.peek()
  while True:
    try:
      value, end = _decode(text.rest, text.at)
      # A value is whole when something stands behind it: a number could go on in the next piece.
      if _SPACE.match(text.rest, end).end() < len(text.rest):  # type: ignore[union-attr]
        break
      what = "the file ends inside a list or object"
    except (ValueError, RecursionError) as error:
      # Only its words: the error itself would keep the text that was read alive, piece after piece.
      what = getattr(error, "msg", first_line(error))
    if len(text.rest) - text.at > LONGEST:
      raise _broken(text, f"not JSON, or a value of more than {LONGEST} characters ({what})")
    if not text.more():
      raise _broken(text, f"damaged or cut short: not JSON ({what})")
  raw = text.rest[text.at : end]
  text.move(end)
  return value, raw


def _items(path: Path, brackets: str) -> Iterator[tuple[str, list[Any], str]]:
  """(where, [value] or [key, value], how they were written) of the items of one JSON list or object."""
  text = _Text(path)
  what = "JSON list" if brackets == "[]" else "JSON object"
  if text.peek() != brackets[0]:
    raise _broken(text, f"not a {what}, which is needed here")
  text.move(text.at + 1)
  going = text.peek() != brackets[1]
  for number in itertools.count(1):
    if not going:
      break
    if not text.peek():
      raise _broken(text, f"the file ends inside the {what}")
    where = f"{path}:{text.line}: item {number}"  # all may stand on one line
    value, raw = _value(text)
    values = [value]
    if brackets == "{}":
      if text.peek() != ":" or not isinstance(value, str):
        raise _broken(text, f"no key and value of a {what}")
      text.move(text.at + 1)
      value, more = _value(text)
      values, raw = [*values, value], raw + more
    if text.peek() not in (",", brackets[1]):
      raise _broken(text, f"no comma behind an item of the {what}")
    going = text.peek() == ","
    if going:
      text.move(text.at + 1)
    yield where, values, raw
  text.move(text.at + 1)
  if text.peek():
    raise _broken(text, f"text behind the end of the {what}")


def json_array(path: Path, bad: Bad) -> Iterator[tuple[str, dict[str, Any]]]:
  """(where, object) of the elements of one JSON list, which may be far larger than memory."""
  for where, (element,), raw in _items(path, "[]"):
    if not raw.isascii() and re.search("[\udc80-\udcff]", raw):
      bad("not UTF-8", where, "bytes in this element are not UTF-8; convert the file")
    elif isinstance(element, dict):
      yield where, element
    else:
      bad("not an object", where, f"a JSON {type(element).__name__}, not an object")


def json_pairs(path: Path) -> Iterator[tuple[str, str, Any]]:
  """(where, key, value) of the items of one JSON object, which may be far larger than memory."""
  for where, (key, value), _ in _items(path, "{}"):
    yield where, key, value


def json_document(path: Path) -> Any:
  """A file that is one JSON value, read at once."""
  raw = b"".join(chunks(path))
  try:
    return json.loads(raw.decode())
  except UnicodeDecodeError as error:
    line = raw.count(b"\n", 0, error.start) + 1
    raise UserError(f"{path}:{line}: byte {error.start + 1} of the file is not UTF-8; convert the file") from error
  except json.JSONDecodeError as error:
    raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); get or make the file again") from error
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path}:1: not JSON ({first_line(error)}); get or make the file again") from error
