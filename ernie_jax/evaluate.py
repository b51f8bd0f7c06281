"""Runs and qrels in TREC format, MRR@10, R@k and nDCG@10 through `ir_measures`, two runs compared.

One order everywhere: by score, descending; equal scores by passage id, descending, as trec_eval breaks ties.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ernie_jax import config
from ernie_jax.config import UserError, first_line

Run = dict[str, dict[str, float]]  # query id -> passage id -> score
Qrels = dict[str, dict[str, int]]  # query id -> passage id -> relevance; 1 and above is relevant
T = TypeVar("T")

MEASURES = ("MRR@10", "R@20", "nDCG@10", "R@100")
SYSTEMS = ("bm25", "zero_shot", "dual", "late", "cross")  # the rows of a result table, weakest first


def ranked(scores: dict[str, float]) -> list[str]:
  """The passage ids of one query, best first. Raises `UserError` for a score that is NaN."""
  for pid, score in scores.items():
    if math.isnan(score):
      raise UserError(f"the score of passage {pid!r} is NaN: check the model that made it")
  return sorted(sorted(scores, reverse=True), key=scores.__getitem__, reverse=True)  # sorting is stable


# Files


def write_run(run: Run, path: str | Path, tag: str) -> None:
  """Writes `qid Q0 pid rank score tag`, ranks from 1. Queries without passages leave no line.

  Scores keep every digit: `read_run` gives back the same numbers. Raises `UserError` for ids that hold
  white space, NaN, an empty run and a path that cannot be written; an older file then stays as it was.
  """
  if not any(run.values()):
    raise UserError(f"{path}: the run is empty: give it at least one query with one passage")
  config.write(Path(path), (line for qid, scores in run.items() for line in lines(qid, scores, path, tag)))


def lines(qid: str, scores: dict[str, float], path: str | Path, tag: str) -> Iterator[str]:
  """The lines of one query in a run; `path` is for errors."""
  for rank, pid in enumerate(ranked(scores), 1):
    yield f"{_id(qid, path)} Q0 {_id(pid, path)} {rank} {float(scores[pid])!r} {_id(tag, path)}\n"


def read_run(path: str | Path) -> Run:
  """Reads `qid Q0 pid rank score tag`. The score decides the order; the rank column is not looked at.

  Raises `UserError` with `path:line` for other than six columns, a score that is not a number, a passage
  given twice to a query or bytes that are not UTF-8; with `path` for a missing or empty file.
  """
  return _read(scored(path))


def scored(path: str | Path) -> Iterator[tuple[str, str, str, float]]:
  """A run line by line: `path:line`, query id, passage id, score. Raises `UserError` as `read_run` does."""
  return _parsed(path, "qid Q0 pid rank score tag", value=4, parse=_score)


def write_qrels(qrels: Qrels, path: str | Path) -> None:
  """Writes `qid 0 pid rel`; raises `UserError` as `write_run` does."""
  if not any(qrels.values()):
    raise UserError(f"{path}: the qrels are empty: give them at least one query with one passage")
  rows = ((qid, pid, relevance) for qid, judged in qrels.items() for pid, relevance in judged.items())
  config.write(Path(path), (f"{_id(qid, path)} 0 {_id(pid, path)} {int(relevance)}\n" for qid, pid, relevance in rows))


def read_qrels(path: str | Path) -> Qrels:
  """Reads `qid 0 pid rel`; raises `UserError` as `read_run` does."""
  return _read(_parsed(path, "qid 0 pid rel", value=3, parse=_relevance))


def write_queries(queries: Iterable[tuple[str, str]], path: str | Path) -> None:
  """Writes ids and texts as lines `qid TAB query`, each text on one line; raises `UserError` as `write_run` does."""
  config.write(Path(path), (f"{_id(qid, path)}\t{' '.join(text.split())}\n" for qid, text in queries))


def read_queries(path: str | Path) -> dict[str, str]:
  """Reads lines `qid TAB query`: {query id: text}. Raises `UserError` as `read_run` does."""
  found: dict[str, str] = {}
  for where, line in _lines(path, "qid TAB query"):
    qid, tab, text = line.partition("\t")
    if not tab or qid.split() != [qid] or not text.strip():
      raise UserError(f"{where}: not `qid TAB query`: an id without white space, one tab, and a text are needed")
    if qid in found:
      raise UserError(f"{where}: query {qid!r} is given twice: remove one of them")
    found[qid] = text.strip()
  return found


def _id(text: str, path: str | Path) -> str:
  if text.split() != [text]:
    raise UserError(f"{path}: id {text!r} is empty or holds white space, which separates columns here: rename it")
  return text


def _read(parsed: Iterable[tuple[str, str, str, T]]) -> dict[str, dict[str, T]]:
  result: dict[str, dict[str, T]] = {}
  for where, qid, pid, value in parsed:
    passages = result.setdefault(qid, {})
    if pid in passages:
      raise UserError(f"{where}: passage {pid!r} is given twice to query {qid!r}: remove one of them")
    passages[pid] = value
  return result


def _parsed(path: str | Path, columns: str, value: int, parse: Callable[[str], T]) -> Iterator[tuple[str, str, str, T]]:
  count = len(columns.split())
  for where, line in _lines(path, columns):
    cells = line.split()
    if len(cells) != count:
      raise UserError(f"{where}: {len(cells)} columns, expected {count}: {columns}")
    try:
      parsed = parse(cells[value])
    except ValueError as error:
      raise UserError(f"{where}: column {value + 1} is {cells[value]!r}, expected {error}") from None
    yield where, cells[0], cells[2], parsed


def _lines(path: str | Path, columns: str) -> Iterator[tuple[str, str]]:
  """`path:line` and text of each line; a `UserError` for a file that cannot be read, is empty or not UTF-8."""
  number = 0
  try:
    with open(path, "rb") as file:
      for number, line in enumerate(file, 1):
        try:
          # The mark that some editors put first would otherwise become part of the first query's id.
          yield f"{path}:{number}", line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
          raise UserError(f"{path}:{number}: not UTF-8: convert the file, for example with iconv") from None
  except OSError as error:
    raise UserError(f"{path}: cannot be read: {error.strerror or error}; give a file of lines {columns}") from error
  if not number:
    raise UserError(f"{path}:1: the file is empty, expected lines {columns}")


def _score(cell: str) -> float:
  try:
    score = float(cell)
  except ValueError:
    score = math.nan
  if math.isnan(score) or "_" in cell:
    raise ValueError("a number as the score")
  return score


def _relevance(cell: str) -> int:
  if not re.fullmatch(r"[+-]?[0-9]+", cell):
    raise ValueError("a whole number as the relevance")
  return int(cell)


# Measures


def metrics(run: Run, qrels: Qrels) -> dict[str, float]:
  """The mean of each of `MEASURES` over all queries of `qrels`; a query that `run` lacks counts 0."""
  return {measure: mean(own) for measure, own in values(run, qrels, MEASURES).items()}


def mean(values: dict[str, float]) -> float:
  """Over queries."""
  return sum(values.values()) / len(values)


def per_query(run: Run, qrels: Qrels, measure: str) -> dict[str, float]:
  """One measure of each query of `qrels`, in their order: any that `ir_measures` knows by name."""
  return values(run, qrels, (measure,))[measure]


def values(run: Run, qrels: Qrels, measures: Iterable[str]) -> dict[str, dict[str, float]]:
  """{measure: {query of `qrels`: value}}: those that `ir_measures` knows by name; a query that `run` lacks has 0.

  Raises `UserError` for a measure that is not known or cannot be computed here, for a NaN score and for empty qrels.
  """
  import ir_measures

  if not qrels:
    raise UserError("the qrels are empty: there is no query to measure")
  wanted = parsed(measures)
  # ir_measures joins two programs: one breaks ties by ascending id, the other by descending id after rounding
  # scores to single precision. Ranks in place of scores give both the same order, that of the run file.
  ranks = {qid: {pid: -float(rank) for rank, pid in enumerate(ranked(run[qid]))} for qid in qrels if qid in run}
  found = {measure: dict.fromkeys(qrels, 0.0) for measure in wanted.values()}
  try:
    for result in ir_measures.iter_calc(list(found), qrels, ranks):
      found[result.measure][result.query_id] = float(result.value)
  except Exception as error:  # each program behind a measure has its own
    raise UserError(f"{', '.join(wanted)}: cannot be measured here ({first_line(error)}); leave it out") from error
  return {name: found[measure] for name, measure in wanted.items()}


def parsed(measures: Iterable[str]) -> dict[str, Any]:
  """The measures of `ir_measures` by their names; a `UserError` for a name that is none, and for no name."""
  import ir_measures

  found = {}
  for name in measures:
    try:
      found[name] = ir_measures.parse_measure(name)
      found[name].validate_params()
      if found[name].params.get("cutoff", 1) < 1:  # trec_eval would end the process
        raise ValueError
    except (ValueError, NameError, TypeError, AssertionError) as error:
      raise UserError(f"measure {name!r} is not known: use for example {', '.join(MEASURES)}") from error
  if not found:
    raise UserError(f"no measure is named: use for example {', '.join(MEASURES)}")
  return found


def bootstrap(
  a: dict[str, float], b: dict[str, float], seed: int = 0, samples: int = 10_000
) -> tuple[float, float, float]:
  """Mean of a - b over queries with its 95 % interval, (difference, low, high): paired percentile bootstrap.

  Queries are drawn with replacement; both systems are always compared on the same ones. The same seed gives
  the same interval. Raises `ValueError` unless both hold the same queries, at least one.
  """
  differences = _differences(a, b)
  rng = np.random.default_rng(seed)
  rows = max(1, 4_000_000 // len(differences))  # draws held at once: 32 MB of indices
  draw = lambda count: differences[rng.integers(len(differences), size=(count, len(differences)))]
  means = [draw(min(rows, samples - done)).mean(axis=1) for done in range(0, samples, rows)]
  low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
  return float(differences.mean()), float(low), float(high)


def p_value(a: dict[str, float], b: dict[str, float], seed: int = 0, samples: int = 10_000) -> float:
  """Two-sided p of the mean of a - b over queries: paired randomisation test (Smucker, Allan, Carterette 2007).

  Were both systems the same, each query's difference might as well have the other sign. Signs are drawn `samples`
  times, or all ways are tried where those are fewer. The same seed gives the same p. Raises `ValueError` as
  `bootstrap` does.
  """
  import scipy.stats

  differences = _differences(a, b)
  if len(differences) == 1:  # SciPy wants two; with either sign, one difference is as large
    return 1.0
  result = scipy.stats.permutation_test(
    (differences,),
    lambda x, axis: x.mean(axis=axis),
    permutation_type="samples",
    n_resamples=samples,
    batch=max(1, 4_000_000 // len(differences)),  # signs held at once
    rng=seed,
  )
  return float(result.pvalue)


def _differences(a: dict[str, float], b: dict[str, float]) -> np.ndarray:
  if not a or a.keys() != b.keys():
    raise ValueError(f"a paired comparison needs the same queries on both sides, got {len(a)} and {len(b)}")
  return np.array([a[qid] - b[qid] for qid in a])


def surprise(scores: np.ndarray, temperature: float) -> float:
  """Mean of -log p(column 0), p = softmax(scores / temperature), over rows [Q, K]."""
  import scipy.special

  scaled = scores / temperature
  return float(np.mean(scipy.special.logsumexp(scaled, axis=1) - scaled[:, 0]))


def calibrated(scores: np.ndarray) -> float | None:
  """The temperature at which softmax(scores / temperature) is as sure as it is right (Guo et al. 2017, section 4.2).

  `scores` [Q, K] hold the positive at column 0. The temperature is the one of least `surprise`; None where there is
  none: no candidate scores above its positive, scores tell nothing of it, or some are not finite.
  """
  import scipy.optimize
  import scipy.special

  differences = scores - scores[:, :1]

  def slope(rate: float) -> float:  # of the surprise in 1 / temperature, which it rises with
    return float((scipy.special.softmax(differences * math.exp(rate), axis=1) * differences).sum(1).mean())

  if not np.isfinite(differences).all() or not differences.any():
    return None
  middle = -math.log(np.abs(differences).max())
  low, high = middle - 14, middle + 14  # a millionth and a million of it
  return None if slope(low) >= 0 or slope(high) <= 0 else math.exp(-scipy.optimize.brentq(slope, low, high))


def table(results: dict[str, dict[str, float]]) -> str:
  """An aligned text table: a row per system, a column per measure, three decimals, `-` for none."""
  rows = list(dict.fromkeys([name for name in SYSTEMS if name in results] + list(results)))
  found = [measure for row in rows for measure in results[row]]
  columns = list(dict.fromkeys([name for name in MEASURES if name in found] + found))
  cells = [["", *columns]] + [
    [row, *(f"{results[row][column]:.3f}" if column in results[row] else "-" for column in columns)] for row in rows
  ]
  return aligned(cells)


def aligned(cells: list[list[str]]) -> str:
  """Lines of the same number of cells as a text: the first column to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(*cells)]
  return "\n".join(
    "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
    for line in cells
  )
