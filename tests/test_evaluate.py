"""Measures against closed forms and ir_measures, files against damage."""

import contextlib
import itertools
import math
import operator
import os
import random
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import pytrec_eval
import scipy.stats

from ernie_jax import config, evaluate
from ernie_jax.__main__ import main
from ernie_jax.config import UserError


def random_run(seed, queries=20, passages=30, depth=10, scores=4):
  """Few different scores: most neighbours are tied."""
  rng = random.Random(seed)
  ids = [f"p{i}" for i in range(passages)]
  run = {f"q{i}": {p: float(rng.randrange(scores)) for p in rng.sample(ids, depth)} for i in range(queries)}
  qrels = {f"q{i}": {p: rng.randrange(3) for p in rng.sample(ids, 6)} for i in range(queries)}
  return run, qrels


# Measures


def test_hand_computed():
  run = {"a": {"x": 3.0, "y": 2.0, "z": 1.0}, "b": {"x": 1.0}}
  qrels = {"a": {"y": 1, "z": 2, "w": 1}, "b": {"x": 1}}
  # a: relevance in ranked order 0 1 2, ideal order 2 1 1
  gain = 1 / math.log2(3) + 2 / math.log2(4)
  ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
  assert evaluate.metrics(run, qrels) == pytest.approx(
    {
      "MRR@10": (1 / 2 + 1) / 2,
      "R@20": (2 / 3 + 1) / 2,
      "nDCG@10": (gain / ideal + 1) / 2,
      "R@100": (2 / 3 + 1) / 2,
    }
  )


def test_cutoffs():
  run = {"q": {f"p{i:03d}": -float(i) for i in range(200)}}
  rank = lambda n: evaluate.metrics(run, {"q": {f"p{n - 1:03d}": 1}})
  assert rank(10)["MRR@10"] == pytest.approx(1 / 10)
  assert rank(11)["MRR@10"] == 0
  assert (rank(20)["R@20"], rank(21)["R@20"], rank(21)["R@100"], rank(101)["R@100"]) == (1, 0, 1, 0)
  assert rank(11)["nDCG@10"] == 0


def test_a_missing_query_counts_zero_and_an_unjudged_one_not_at_all():
  qrels = {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1}, "d": {"x": 0}}
  run = {"a": {"x": 1.0}, "b": {}, "d": {"x": 1.0}, "stranger": {"x": 1.0}, "another": {"x": 1.0}}
  assert set(evaluate.metrics(run, qrels).values()) == {0.25}
  assert evaluate.per_query(run, qrels, "MRR@10") == {"a": 1, "b": 0, "c": 0, "d": 0}
  assert set(evaluate.metrics({}, qrels).values()) == {0}


CUTOFFS = (5, 20, 50, 100, 1000)
EVERY = ("MRR@10", *(f"R@{k}" for k in CUTOFFS), "nDCG@10")


def uneven_run(seed):
  """Ties, relevance from -1 to 3, lists of all lengths, queries that only one side has, ids beyond ASCII."""
  rng = random.Random(seed)
  ids = [f"{rng.choice('aZ9é中')}{i}" for i in range(150)]
  depth = rng.choice((3, 9, 30, 120))
  run, qrels = {}, {}
  for i in range(12):
    if rng.random() < 0.8:
      run[f"q{i}"] = {p: rng.randrange(-3, 4) / 4 for p in rng.sample(ids, rng.randint(1, depth))}
    if rng.random() < 0.8 or not qrels:
      qrels[f"q{i}"] = {p: rng.choice((-1, 0, 0, 1, 1, 2, 3)) for p in rng.sample(ids, rng.randint(1, 60))}
  return run, qrels


def trec_eval(run, qrels):
  """{measure of `EVERY`: {query: value}} by trec_eval's own code, on the scores as they are."""
  recall = "recall." + ",".join(map(str, CUTOFFS))
  found = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank", "ndcg_cut.10", recall}).evaluate(run)
  value = lambda qid, name: found.get(qid, {}).get(name, 0.0)
  result = {f"R@{k}": {qid: value(qid, f"recall_{k}") for qid in qrels} for k in CUTOFFS}
  # trec_eval's reciprocal rank has no cut-off
  first = {qid: value(qid, "recip_rank") for qid in qrels}
  result["MRR@10"] = {qid: rr if rr > 1 / 10.5 else 0.0 for qid, rr in first.items()}
  return result | {"nDCG@10": {qid: value(qid, "ndcg_cut_10") for qid in qrels}}


@pytest.mark.parametrize("hundred", range(3))
def test_equals_trec_eval(hundred):
  """Equal scores by passage id, descending; the mean is over all judged queries."""
  for seed in range(100):
    run, qrels = uneven_run(1000 * hundred + seed)
    mine, theirs = evaluate.values(run, qrels, EVERY), trec_eval(run, qrels)
    assert list(mine) == list(EVERY)
    for measure, values in mine.items():
      assert list(values) == list(qrels)
      assert values == pytest.approx(theirs[measure], abs=1e-6), (seed, measure)


def test_equals_ir_measures_with_ties():
  names = ("RR", "AP", "P@5", *EVERY[1:])
  for seed in range(100):
    run, qrels = uneven_run(seed)
    mine = evaluate.values(run, qrels, names)
    theirs = ir_measures.pytrec_eval.calc_aggregate([ir_measures.parse_measure(x) for x in names], qrels, run)
    for name in names:
      assert evaluate.mean(mine[name]) == pytest.approx(theirs[ir_measures.parse_measure(name)], abs=1e-6), (seed, name)


@pytest.mark.parametrize("seed", range(5))
def test_measures_follow_the_order_of_the_run_file(seed, tmp_path):
  run, qrels = random_run(seed, depth=25)
  evaluate.write_run(run, tmp_path / "run", "tag")
  ranks = {}
  for line in (tmp_path / "run").read_text().splitlines():
    qid, _, pid, rank, _, _ = line.split()
    if qrels[qid].get(pid, 0) > 0 and int(rank) <= 10:
      ranks.setdefault(qid, int(rank))
  expected = {qid: 1 / ranks[qid] if qid in ranks else 0 for qid in qrels}
  assert evaluate.per_query(run, qrels, "MRR@10") == pytest.approx(expected)


def test_scores_closer_than_single_precision_keep_their_order():
  run = {"q": {f"p{i}": 1 - i * 1e-12 for i in range(5)}}
  assert set(evaluate.metrics(run, {"q": {"p0": 1}}).values()) == {1}


def test_queries_are_read_as_they_were_written_on_one_line_each(tmp_path):
  queries = {"q1": "a b", "q2": "tab\tand\nline", "q3": "  \u3000wide\u2028 "}
  evaluate.write_queries(queries.items(), tmp_path / "queries.tsv")
  read = evaluate.read_queries(tmp_path / "queries.tsv")
  assert read == {"q1": "a b", "q2": "tab and line", "q3": "wide"}
  with pytest.raises(UserError, match="id 'q 4'"):
    evaluate.write_queries([("q 4", "text")], tmp_path / "queries.tsv")
  assert evaluate.read_queries(tmp_path / "queries.tsv") == read


def test_per_query_means_are_the_metrics():
  run, qrels = random_run(7)
  for name, value in evaluate.metrics(run, qrels).items():
    values = evaluate.per_query(run, qrels, name)
    assert list(values) == list(qrels)
    assert sum(values.values()) / len(values) == pytest.approx(value)


def test_bad_measure_input():
  with pytest.raises(UserError, match="qrels are empty"):
    evaluate.metrics({"q": {"x": 1.0}}, {})
  with pytest.raises(UserError, match="NaN"):
    evaluate.metrics({"q": {"x": math.nan}}, {"q": {"x": 1}})
  for name in ("speed", "MRR@x", "", "P", "P@0", "nDCG@-3", "R@1.5", "P(level=2)@3"):  # at P@0 trec_eval aborts
    with pytest.raises(UserError, match=r"measure .* is not known"):
      evaluate.per_query({}, {"q": {"x": 1}}, name)
  with pytest.raises(UserError, match="no measure"):
    evaluate.values({}, {"q": {"x": 1}}, ())
  with pytest.raises(UserError, match="alpha_nDCG@5: cannot be measured here"):
    evaluate.per_query({"q": {"x": 1.0}}, {"q": {"x": 1}}, "alpha_nDCG@5")


def test_two_names_of_one_measure():
  found = evaluate.values({"q": {"x": 1.0}}, {"q": {"x": 1}, "r": {"x": 1}}, ("RR@10", "MRR@10"))
  assert found == {"RR@10": {"q": 1, "r": 0}, "MRR@10": {"q": 1, "r": 0}}


# Files


def test_run_round_trip(tmp_path):
  rng = random.Random(0)
  run = {f"q{i}": {f"é{j}": rng.gauss(0, 1) * 10.0 ** rng.randrange(-30, 30) for j in range(20)} for i in range(9)}
  run["q0"] |= {"low": -math.inf, "single": float(np.float32(0.1)), "whole": 3}
  evaluate.write_run(run, tmp_path / "run", "tag")
  assert evaluate.read_run(tmp_path / "run") == run
  assert os.listdir(tmp_path) == ["run"]


def test_run_lines(tmp_path):
  evaluate.write_run(
    {"q": {"b": 1.0, "a": 2.0, "c": 1.0}, "none": {}, "r": {"a": np.float32(0.5)}}, tmp_path / "run", "bm25"
  )
  assert (tmp_path / "run").read_text() == (
    "q Q0 a 1 2.0 bm25\nq Q0 c 2 1.0 bm25\nq Q0 b 3 1.0 bm25\nr Q0 a 1 0.5 bm25\n"
  )


def test_qrels_round_trip(tmp_path):
  _, qrels = random_run(1)
  evaluate.write_qrels(qrels, tmp_path / "qrels")
  assert evaluate.read_qrels(tmp_path / "qrels") == qrels


@pytest.mark.parametrize(
  "line",
  [
    b"",
    b"q Q0 p 1 0.5",
    b"q Q0 p 1 0.5 tag more",
    b"q Q0 p 1 high tag",
    b"q Q0 p 1 nan tag",
    b"q Q0 p 1 1_0 tag",
    b"q Q0 first 1 0.5 tag",
    b"q Q0 \xff\xfe 1 0.5 tag",
  ],
)
def test_damaged_run(tmp_path, line):
  path = tmp_path / "some.run"
  path.write_bytes(b"q Q0 first 1 0.5 tag\nq Q0 second 2 0.4 tag\n" + line + b"\nq Q0 last 3 0.3 tag\n")
  with pytest.raises(UserError) as error:
    evaluate.read_run(path)
  assert f"{path}:3: " in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "line", [b"", b"q p 1", b"q 0 p 1 1", b"q 0 p 0.5", b"q 0 p yes", b"q 0 first 0", b"\xff 0 p 1"]
)
def test_damaged_qrels(tmp_path, line):
  path = tmp_path / "some.qrels"
  path.write_bytes(b"q 0 first 1\n" + line + b"\n")
  with pytest.raises(UserError) as error:
    evaluate.read_qrels(path)
  assert f"{path}:2: " in str(error.value)


@pytest.mark.parametrize("read", [evaluate.read_run, evaluate.read_qrels])
def test_no_file(tmp_path, read):
  (tmp_path / "empty").touch()
  with pytest.raises(UserError, match="empty:1: the file is empty"):
    read(tmp_path / "empty")
  for path in (tmp_path, tmp_path / "missing"):
    with pytest.raises(UserError, match="cannot be read") as error:
      read(path)
    assert str(path) in str(error.value)


def test_byte_order_mark_is_no_part_of_the_first_id(tmp_path):
  (tmp_path / "qrels").write_bytes(b"\xef\xbb\xbfq 0 p 1\r\nr 0 p 1\r\n")
  assert evaluate.read_qrels(tmp_path / "qrels") == {"q": {"p": 1}, "r": {"p": 1}}


@pytest.mark.parametrize(
  "run",
  [{}, {"q": {}}, {"q": {"p": 1.0}, "a b": {"p": 1.0}}, {"q": {"p": 1.0, "": 0.5}}, {"q": {"p": math.nan}}],
)
def test_a_failed_write_leaves_the_older_file_and_nothing_else(tmp_path, run):
  path = tmp_path / "run"
  path.write_text("older")
  with pytest.raises(UserError):
    evaluate.write_run(run, path, "tag")
  assert path.read_text() == "older"
  assert os.listdir(tmp_path) == ["run"]


def test_a_failure_half_way_leaves_nothing(tmp_path):
  def chunks():
    yield "half"
    raise KeyboardInterrupt

  with contextlib.suppress(KeyboardInterrupt):
    config.write(tmp_path / "file", chunks())
  assert os.listdir(tmp_path) == []


def test_ids_with_white_space_are_named(tmp_path):
  with pytest.raises(UserError, match="'my tag'"):
    evaluate.write_run({"q": {"p": 1.0}}, tmp_path / "run", "my tag")
  with pytest.raises(UserError, match=r"'a\\tb'"):
    evaluate.write_qrels({"q": {"a\tb": 1}}, tmp_path / "qrels")
  with pytest.raises(UserError, match="qrels are empty"):
    evaluate.write_qrels({}, tmp_path / "qrels")
  assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path):
  (tmp_path / "file").touch()
  (tmp_path / "folder").mkdir()
  for path in (tmp_path / "missing" / "run", tmp_path / "file" / "run", tmp_path / "folder"):
    with pytest.raises(UserError, match="cannot be written"):
      evaluate.write_run({"q": {"p": 1.0}}, path, "tag")
  assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


# Bootstrap


def test_bootstrap_of_a_system_with_itself_is_zero():
  a = {f"q{i}": random.Random(i).random() for i in range(100)}
  assert evaluate.bootstrap(a, dict(reversed(a.items()))) == (0, 0, 0)


def test_bootstrap_of_a_constant_shift_has_no_width():
  b = {f"q{i}": i / 64 for i in range(100)}  # exact in binary
  a = {qid: value + 0.25 for qid, value in b.items()}
  assert evaluate.bootstrap(a, b) == (0.25, 0.25, 0.25)
  assert evaluate.bootstrap(b, a) == (-0.25, -0.25, -0.25)


def test_bootstrap_approaches_the_normal_interval():
  rng = np.random.default_rng(1)
  values = rng.normal(0.1, 1, 2000)
  a, b = {str(i): float(x) for i, x in enumerate(values)}, {str(i): 0.0 for i in range(len(values))}
  difference, low, high = evaluate.bootstrap(a, b, samples=4000)
  error = 1.96 * values.std() / math.sqrt(len(values))
  assert difference == pytest.approx(values.mean())
  assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=error / 10)
  assert evaluate.bootstrap(a, b, samples=4000) == (difference, low, high)
  assert evaluate.bootstrap(a, b, seed=1, samples=4000) != (difference, low, high)


def test_a_comparison_needs_pairs():
  for compare in (evaluate.bootstrap, evaluate.p_value):
    for a, b in (({}, {}), ({"q": 1.0}, {"r": 1.0})):
      with pytest.raises(ValueError, match="same queries"):
        compare(a, b)


# Significance


@pytest.mark.parametrize("seed", range(5))
def test_p_is_the_share_of_signs_with_as_large_a_difference(seed):
  """All 2^n ways, by hand: reciprocal ranks, so many of them are tied with what was seen."""
  rng = random.Random(seed)
  draw = lambda: {str(i): rng.choice((0, 1 / 3, 1 / 2, 1)) for i in range(10)}
  a, b = draw(), draw()
  differences = [a[qid] - b[qid] for qid in a]
  seen = abs(sum(differences)) - 1e-9
  ways = list(itertools.product((1, -1), repeat=10))
  expected = sum(abs(sum(map(operator.mul, way, differences))) >= seen for way in ways) / len(ways)
  assert evaluate.p_value(a, b) == pytest.approx(expected)
  assert evaluate.p_value(b, a) == pytest.approx(expected)


def test_p_approaches_the_t_test_s():
  rng = np.random.default_rng(3)
  for shift in (0.0, 0.04, 0.06, 0.08):
    values = rng.normal(shift, 1, 2000)
    a, b = {str(i): float(x) for i, x in enumerate(values)}, {str(i): 0.0 for i in range(len(values))}
    expected = scipy.stats.ttest_1samp(values, 0).pvalue
    assert evaluate.p_value(a, b) == pytest.approx(expected, abs=4 * math.sqrt(expected / 10_000) + 2e-4)
  assert evaluate.p_value(a, b, samples=500) == evaluate.p_value(a, b, samples=500)


def test_p_of_no_difference_is_one():
  a = {f"q{i}": i / 8 for i in range(8)}
  assert evaluate.p_value(a, a) == 1
  assert evaluate.p_value({"q": 1.0}, {"q": 0.0}) == 1  # either sign is as likely, and as large


# Table


def test_table():
  results = {"dual": {"MRR@10": 0.5, "R@20": 2 / 3}, "other": {"speed": 1.0}, "bm25": {"R@20": 1.0}}
  assert evaluate.table(results).split("\n") == [
    "       MRR@10   R@20  speed",
    "bm25        -  1.000      -",
    "dual    0.500  0.667      -",
    "other       -      -  1.000",
  ]


# The verb


@pytest.fixture
def files(tmp_path, monkeypatch):
  """`qrels`, `a.trec` and `b.trec` in the present folder: the second has fewer queries, and strangers."""
  monkeypatch.chdir(tmp_path)
  run, qrels = random_run(3, queries=30)
  other, _ = random_run(4, queries=30)
  other = {(qid if int(qid[1:]) < 20 else f"x{qid}"): scores for qid, scores in other.items()}
  evaluate.write_qrels(qrels, "qrels")
  evaluate.write_run(run, "a.trec", "a")
  evaluate.write_run(other, "b.trec", "b")
  return qrels, {"a.trec": run, "b.trec": other}


def test_the_table_holds_trec_eval_s_means(files, capsys):
  qrels, runs = files
  assert main(["evaluate", "qrels", "a.trec", "b.trec"]) == 0
  printed = capsys.readouterr()
  head, *rows = [line.split() for line in printed.out.split("\n\n")[0].splitlines()]
  assert head == list(EVERY)
  assert [row[0] for row in rows] == ["a.trec", "b.trec"]
  for name, *cells in rows:
    means = [sum(own.values()) / len(qrels) for own in map(trec_eval(runs[name], qrels).get, EVERY)]
    assert [float(cell) for cell in cells] == pytest.approx(means, abs=5.1e-5)
  assert printed.err.splitlines() == [
    "b.trec: lacks 10 of 30 judged queries, they count 0",
    "b.trec: 10 of 30 queries are not judged, they do not count",
  ]


def test_each_run_is_compared_with_the_first(files, capsys):
  qrels, runs = files
  assert main(["evaluate", "qrels", "a.trec", "b.trec", "a.trec", "--measures", "MRR@10", "nDCG@10"]) == 0
  _, *blocks = capsys.readouterr().out.rstrip().split("\n\n")
  ((head, *rows),) = [[line.split() for line in block.splitlines()] for block in blocks]
  assert head[:3] == ["b.trec", "-", "a.trec"]
  for name, *cells in rows:
    b, a = (evaluate.per_query(runs[run], qrels, name) for run in ("b.trec", "a.trec"))
    expected = [*evaluate.bootstrap(b, a), evaluate.p_value(b, a)]
    assert [float(cell) for cell in cells] == pytest.approx(expected, abs=5.1e-5)
  assert [row[0] for row in rows] == ["MRR@10", "nDCG@10"]


def test_values_of_each_query(files, capsys):
  qrels, runs = files
  asked = ["evaluate", "qrels", "a.trec", "b.trec", "--measures", *EVERY, "--per-query"]
  assert main([*asked, "-"]) == 0
  printed = capsys.readouterr().out
  assert main([*asked, "values.tsv"]) == 0
  assert Path("values.tsv").read_text() == printed
  head, *rows = [line.split("\t") for line in printed.splitlines()]
  assert head == ["query", "run", *EVERY]
  assert [row[:2] for row in rows] == [[qid, name] for qid in qrels for name in runs]
  expected = {name: trec_eval(run, qrels) for name, run in runs.items()}
  for qid, name, *cells in rows:
    assert [float(cell) for cell in cells] == pytest.approx([expected[name][m][qid] for m in EVERY], abs=1e-6)


def test_runs_of_one_name_are_told_apart_by_their_folders(files, tmp_path, capsys):
  (tmp_path / "c").mkdir()
  (tmp_path / "c" / "a.trec").write_text("q1 Q0 p1 1 1.0 c\n")
  assert main(["evaluate", "qrels", "a.trec", "c/a.trec", "b.trec", "--measures", "R@5"]) == 0
  rows = capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]
  assert [row.split()[0] for row in rows] == ["a.trec", "c/a.trec", "b.trec"]


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (["qrels"], "evaluate qrels: name a run to measure"),
    (["qrels", "strange.trec"], "strange.trec: none of its 1 queries is judged in qrels"),
    (["qrels", "twice.trec"], "twice.trec:2: passage 'p' is given twice to query 'q1'"),
    (["twice.qrels", "a.trec"], "twice.qrels:3: passage 'p' is given twice to query 'q1'"),
    (["qrels", "a.trec", "nowhere"], "nowhere: cannot be read"),
    (["qrels", "qrels"], "qrels:1: 4 columns, expected 6"),
    ([".", "a.trec"], ".: is a folder"),
    (["qrels", "nowhere", "--measures", "P@0"], "measure 'P@0' is not known"),  # said before files are read
    (["qrels", "a.trec", "--measures"], "no measure is named"),
    (["qrels", "a.trec", "--per-query", "nowhere/values.tsv"], "nowhere/values.tsv: cannot be written"),
  ],
)
def test_a_mistake_is_one_line_and_writes_nothing(args, says, files, tmp_path, capsys):
  (tmp_path / "strange.trec").write_text("other Q0 p 1 1.0 tag\n")
  (tmp_path / "twice.trec").write_text("q1 Q0 p 1 1.0 tag\nq1 Q0 p 2 0.5 tag\n")
  (tmp_path / "twice.qrels").write_text("q1 0 p 1\nq2 0 p 1\nq1 0 p 0\n")
  before = sorted(os.listdir())
  extra = [] if "--per-query" in args else ["--per-query", "values.tsv"]
  assert main(["evaluate", *args, *extra]) == 2
  printed = capsys.readouterr()
  assert printed.out == ""
  assert printed.err.startswith("ernie-jax: ")
  assert says in printed.err
  assert printed.err.count("\n") == 1
  assert sorted(os.listdir()) == before


def test_calibration_in_closed_form():
  """Two candidates a margin m apart, the positive above in a share f: least where 1 / (1 + exp(-m / t)) = f."""
  right, wrong = np.array([[5.0, 2.0]]), np.array([[1.0, 4.0]])
  scores = np.concatenate([right] * 3 + [wrong])
  assert evaluate.calibrated(scores) == pytest.approx(3 / np.log(3), rel=1e-9)
  assert evaluate.surprise(scores, 3 / np.log(3)) == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
  for nothing in (right, wrong, np.ones((2, 3)), np.ones((2, 1)), np.where(scores > 4, np.nan, scores)):
    assert evaluate.calibrated(nothing) is None  # never wrong, never right, always the same, no list, no number


def test_the_calibrated_temperature_is_the_best_and_follows_the_scores_scale():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(500, 8)) + np.array([1.0] + [0.0] * 7)
  best = evaluate.calibrated(scores)
  assert all(evaluate.surprise(scores, best) <= evaluate.surprise(scores, best * x) for x in (0.5, 0.99, 1.01, 2))
  assert evaluate.surprise(scores, best) < np.log(8)
  assert evaluate.calibrated(20 * scores + 7) == pytest.approx(20 * best, rel=1e-6)
