"""BM25, the classic baseline: what a word is, and an index of passages by their words.

Importing `bm25s`, which happens when an index is built or opened, starts JAX's devices (it looks for the fastest top-k
there is, and has no switch for that): in a multi-host program call `jax.distributed.initialize` first.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import re
import shutil
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ernie_jax.columns import Ragged
from ernie_jax.config import UserError, first_line
from ernie_jax.progress import Progress

if TYPE_CHECKING:
  import bm25s

PARAMETERS = "params.index.json"  # the name is bm25s's

_WORD = re.compile(r"\w+")
# Underscores, and the places where case changes: solverName -> solver Name, HTTPServer -> HTTP Server.
_JOINT = re.compile(r"_+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+)")  # kana and Han characters


def words(text: str) -> list[str]:
  """Lower-case words; `numpy.linalg.lstsqSolver_x` gives numpy linalg lstsq solver x, and lstsqsolver_x.

  Chinese and Japanese write no spaces: there, every two neighbouring characters are a word, as in Lucene's CJKAnalyzer.
  MRR@10 of 1,258 docstring summaries over 2,594 bodies: identifiers as they stand 0.530, split 0.601,
  split and whole 0.612; split, without one-letter words 0.593.
  """
  return [part for word in _WORD.findall(_UNSPACED.sub(r" \1 ", text)) for part in _parts(word)]


@functools.lru_cache(maxsize=2**17)  # most words of a corpus are frequent ones: 3 times as fast
def _parts(word: str) -> tuple[str, ...]:
  if _UNSPACED.fullmatch(word):
    return tuple(first + second for first, second in itertools.pairwise(word)) or (word,)
  parts = [part for part in _JOINT.split(word) if part]
  return tuple(part.lower() for part in (parts if len(parts) <= 1 else [*parts, word]))


def _stems() -> Callable[[str], list[str]]:
  """Text -> the English stems of its words, without stop words. Each thread needs one of its own."""
  import Stemmer
  from bm25s.stopwords import STOPWORDS_EN

  stemmer, stop = Stemmer.Stemmer("english", 0), frozenset(STOPWORDS_EN)  # its cache takes longer than stemming
  return lambda text: stemmer.stemWords([word for word in words(text) if word not in stop])


class BM25:
  """N passages by their words: BM25 in Lucene's form, k1 = 1.5, b = 0.75, English stems.

  Search may come from several threads at once.
  """

  def __init__(self, index: bm25s.BM25):
    """Use `BM25.build` or `BM25.open`."""
    self.index = index

  def __len__(self) -> int:
    return self.index.scores["num_docs"]

  @classmethod
  def build(cls, passages: Sequence[str], directory: Path | None = None) -> BM25:
    """Indexes passages, which are read once, one after the other; kept in `directory` if there is one.

    Memory: 4 bytes for each word of the corpus, and 20 for each different word of each passage; 8 of these stay. An
    index that was in `directory` before is replaced when the new one is whole. Raises `UserError` for passages without
    any word, and for a directory that holds anything else or cannot be written.
    """
    if directory is not None and directory.exists() and not (directory / PARAMETERS).is_file():
      raise UserError(f"{directory}: is there already and holds no index of words; choose another place")
    import bm25s
    from bm25s.tokenization import Tokenized

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    stems = _stems()
    vocabulary: dict[str, int] = {}
    ids, offsets = array("i"), array("q", [0])
    with Progress("words", len(passages), "passages") as bar:
      for passage in passages:
        ids.extend([vocabulary.setdefault(stem, len(vocabulary)) for stem in stems(passage)])
        offsets.append(len(ids))
        bar.advance(1)
    if not vocabulary:
      raise UserError(f"no word in any of {len(passages)} passages: BM25 has nothing to search")
    tokens = Ragged(np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64))
    # SciPy sorts the matrix by words in half the memory that bm25s's own way takes.
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene", backend="numpy", csc_backend="scipy")
    index.index(Tokenized(tokens, vocabulary), create_empty_token=False, show_progress=False)
    if directory is not None:
      _save(index, directory)
    return cls(index)

  @classmethod
  def open(cls, directory: Path) -> BM25:
    """The index that `build` left in a directory, memory-mapped. Raises `UserError` if it is not whole."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    try:
      for name, size in json.loads((directory / "about.json").read_text())["sizes"].items():
        if (directory / name).stat().st_size != size:
          raise ValueError(f"{name} is cut")
      return cls(bm25s.BM25.load(directory, mmap=True))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(f"{directory}: no whole index of words ({first_line(error)}); build it again") from error

  def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 and passage rows int64 [Q, k], best first; equal scores in the order of the passages.

    Passages that share no word with the query are not found: what remains of a row is score -inf, passage -1.
    """
    if k < 1:
      raise ValueError(f"k={k}: must be at least 1")
    stems = _stems()
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    for i, query in enumerate(queries):
      # Not `retrieve`: which of equal scores it leaves out is up to chance.
      values = self.index.get_scores_from_ids(self.index.get_tokens_ids(stems(query)))
      found = np.flatnonzero(values)
      values = values[found]
      if len(found) > k:
        last = np.partition(values, len(found) - k)[len(found) - k]
        kept = np.concatenate([np.flatnonzero(values > last), np.flatnonzero(values == last)])[:k]
        found, values = found[kept], values[kept]
      order = np.argsort(-values, kind="stable")
      scores[i, : len(found)], rows[i, : len(found)] = values[order], found[order]
    return scores, rows


def _save(index: bm25s.BM25, directory: Path) -> None:
  """Into a temporary folder that is renamed when all is there."""
  temporary = directory.with_name(f"{directory.name}.writing-{os.getpid()}")
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    temporary.mkdir(parents=True)
    index.save(temporary, show_progress=False)
    sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
    (temporary / "about.json").write_text(json.dumps({"sizes": sizes}))
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(temporary, directory)
  except OSError as error:
    raise UserError(f"{directory}: cannot be written ({error.strerror or error}); choose another place") from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
