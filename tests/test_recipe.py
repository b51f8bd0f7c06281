"""The whole tiny recipe in real processes: what it leaves, and that no interruption changes its result."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from ernie_jax import collection, columns, config, evaluate, recipe
from ernie_jax.__main__ import main
from ernie_jax.search import Searcher

ROOT = Path(__file__).parent.parent
TINY = [str(ROOT / "configs" / "tiny.py"), "--mine.sample", "5", "--mine.margin", "0", "--mine.refresh", "4"]
TINY += ["--post.steps", "8", "--post.batch", "8", "--post.mlm-length", "64", "--post.weights.nll-de", "1"]
TINY += ["--post.optimizer.learning-rate", "2e-3", "--post.checkpoint-every", "3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return tmp_path_factory.mktemp("recipe")


def begin(place: Path, output: Path) -> subprocess.Popen:
  """Starts the tiny recipe as a user does; compiled programs are shared between the starts of this test."""
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
  }
  command = [sys.executable, "-m", "ernie_jax", "run", *TINY, "--output", str(output)]
  return subprocess.Popen(
    [*command, "--data.cache", str(place / "cache")],
    cwd=ROOT,
    env=os.environ | cache,
    stdout=subprocess.PIPE,
    stderr=open(f"{output}.log", "a"),
    text=True,
  )


@pytest.fixture(scope="module")
def whole(place):
  """An uninterrupted run."""
  process = begin(place, place / "whole")
  printed, _ = process.communicate()
  assert process.returncode == 0, Path(f"{place / 'whole'}.log").read_text()
  return place / "whole", printed


@pytest.mark.timeout(600)
def test_it_leaves_what_the_readme_says(whole):
  directory, printed = whole
  results = json.loads((directory / "metrics.json").read_text())
  for system in evaluate.SYSTEMS:
    assert {"MRR@10", "R@20", "nDCG@10"} <= set(results[system])
    assert f"{results[system]['MRR@10']:.3f}" in printed
  assert results["depth"] == {"late": 20, "cross": 5}
  manifest = json.loads((directory / "manifest.json").read_text())
  assert set(manifest["stages"]) == set(recipe.STAGES)
  assert all(stage["seconds"] > 0 for stage in manifest["stages"].values())
  assert "<svg" in (directory / "report.html").read_text()
  for stage in recipe.TRAINED:
    assert manifest["stages"][stage]["compilations"] == 1, stage
    lines = [json.loads(line) for line in (directory / stage / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, manifest["stages"][stage]["steps"] + 1))
    assert list((directory / stage / "tensorboard").glob("events*"))


def test_attention_maps_are_of_test_queries_and_what_the_cascade_changed(whole):
  directory, _ = whole
  qrels = evaluate.read_qrels(directory / "prepare" / "qrels.test.trec")
  queries = evaluate.read_queries(directory / "prepare" / "queries.test.tsv")
  assert queries.keys() == qrels.keys()
  pairs = json.loads((directory / "evaluate" / "attention.json").read_text())["pairs"]
  assert len(pairs) == len({pair["query"] for pair in pairs}) == 3
  page = (directory / "report.html").read_text()
  assert page.count("<table class=map>") == 12
  assert "Where the rankers disagree" in page
  for pair in pairs:
    assert pair["passage"] in qrels[pair["query"]]
    assert " ".join(pair["text"].split()) == queries[pair["query"]]
    assert pair["before"] != pair["after"]
    for when in ("before", "after"):
      for system in ("cross", "late"):
        values = np.array(pair[when][system])
        assert values.shape == (len(pair["query_tokens"]), len(pair["passage_tokens"]) + bool(pair["more"]))
        np.testing.assert_allclose(values.sum(1), 1, atol=0.0005 * values.shape[1])


def test_post_training_learns_both_and_hands_on_the_student(whole):
  directory, _ = whole
  manifest = json.loads((directory / "post" / "manifest.json").read_text())
  loss = manifest["heldout_mlm"]
  assert loss["after"] < loss["before"] - 0.1
  first, *_, last = [json.loads(line)["terms"] for line in (directory / "post" / "log.jsonl").read_text().splitlines()]
  assert set(first) == {"mlm", "nll_de"}
  assert last["mlm"] < first["mlm"]
  pairs = [columns.matching(directory / "post" / "pairs" / name) for name in ("queries", "passages")]
  assert len(pairs[0]) == len(pairs[1]) > 1000
  assert not (directory / "model" / "model.safetensors").read_bytes().count(b"masked.")


def test_training_helps(whole):
  directory, _ = whole
  results = json.loads((directory / "metrics.json").read_text())
  assert results["dual"]["MRR@10"] > 2 * results["zero_shot"]["MRR@10"]
  assert results["bm25"]["MRR@10"] > 0.4


def test_the_kept_student_is_the_best_on_dev(whole):
  directory, _ = whole
  manifest = json.loads((directory / "manifest.json").read_text())
  dev = {name: manifest["stages"][recipe.encoded_in(name)]["dev"]["MRR@10"] for name in ("interaction", "cascade")}
  assert dev[manifest["best_stage"]] == max(dev.values())
  results = json.loads((directory / "metrics.json").read_text())
  assert results["dual"] == results["stages"][manifest["best_stage"]]["dual"]


def test_run_files_give_the_metrics(whole):
  directory, _ = whole
  results = json.loads((directory / "metrics.json").read_text())
  qrels = evaluate.read_qrels(directory / "prepare" / "qrels.test.trec")
  files = {
    "bm25": "bm25",
    "zero_shot": "zero_shot",
    "cross": "cross",
    "dual": f"dual.{results['best_stage']}",
  }
  for system, name in files.items():
    got = evaluate.metrics(evaluate.read_run(directory / "runs" / f"test.{name}.trec"), qrels)
    assert got == pytest.approx(results[system], abs=1e-9), system


def test_mined_negatives_are_no_positives(whole):
  directory, _ = whole
  mined = evaluate.read_run(directory / "mine" / "negatives.trec")
  qrels = evaluate.read_qrels(directory / "prepare" / "qrels.train.trec")
  passages = collection.load(directory / "mine").passages
  text = dict(zip(passages.ids, passages.texts))
  assert set(mined) == set(qrels)
  for query, passages in mined.items():
    known = {text[passage] for passage in qrels[query]}
    assert len(passages) == 5
    assert not known & {text[passage] for passage in passages}


def test_the_cascade_trains_on_what_the_cross_encoder_left_and_mines_again(whole):
  """Of each denoised list: what was mined, without what the logits beside it say."""
  directory, _ = whole
  manifest = json.loads((directory / "manifest.json").read_text())
  qrels = evaluate.read_qrels(directory / "prepare" / "qrels.train.trec")
  before = evaluate.read_run(directory / "mine" / "negatives.trec")
  assert manifest["stages"]["cascade"]["refreshed"] == [4, 8]
  assert not (directory / "cascade" / "corpus").exists()
  again = [directory / "cascade" / "negatives" / f"{step}.trec" for step in (4, 8)]
  for path in (directory / "denoise" / "negatives.trec", *again):
    kept, logits = evaluate.read_run(path), evaluate.read_run(path.with_suffix(".cross.trec"))
    assert set(logits) == set(qrels)
    dropped = 0
    for query, read in logits.items():
      best = max(read[passage] for passage in qrels[query])
      found = read.keys() - qrels[query].keys()
      assert len(found) == 5
      assert path in again or found == before[query].keys()
      left = {passage for passage in found if read[passage] <= best}
      assert left == kept.get(query, {}).keys()
      dropped += len(found) - len(left)
    assert dropped > 0
    if path not in again:
      assert manifest["stages"]["denoise"]["dropped"] == {"margin": dropped}
  assert again[0].read_bytes() != again[1].read_bytes()


PAPER, DUAL = config.Weights(), config.Weights.only(nll_de=1, kl_ce_de=1, nll_ce=1)


def test_the_check_calibrates_each_ranker(whole):
  check = json.loads((whole[0] / "check" / "manifest.json").read_text())
  used = json.loads((whole[0] / "config.json").read_text())["cascade"]["temperature"]
  assert "dual" in check["temperatures"]  # a tiny cross-encoder's scores may tell nothing
  for name, of in check["temperatures"].items():
    assert of["used"] == used[name]
    assert of["calibrated_loss"] <= of["loss"]


def test_lists_of_dev_hold_the_best_positive_then_negatives():
  identity = np.array([0, 1, 2, 3, 4, 0])  # the last passage has the text of the first
  dev = types.SimpleNamespace(positives=columns.ragged([[0], [4], [1, 2]]))
  fields = {"data": types.SimpleNamespace(queries={"dev": dev}), "identity": identity}
  current = types.SimpleNamespace(**fields, config=config.Config())
  found = np.array([[3, 5, 1, 0], [0, 1, 2, 3], [1, 2, 3, 4]])
  lists = lambda **own: recipe.dev_lists(current, found, config.Train(**own))
  queries, drawn = lists(negatives=2)
  assert queries.tolist() == [0, 2]  # the second's positive is not among the found
  assert [[row[0], *sorted(row[1:])] for row in drawn.tolist()] == [[1, 0, 2], [0, 2, 3]]
  assert lists(negatives=1, hardest=1)[1].tolist() == [[1, 0], [0, 2]]
  assert lists(negatives=2, hardest=1)[1].shape == (0, 3)
  assert lists(negatives=9)[1].shape == (0, 4)  # as many as there are, and none has three
  nothing = recipe.temperatures({"dual": np.ones((3, 4))}, *lists(negatives=9), config.Temperatures())
  assert nothing == {}


def test_a_teacher_that_is_surer_than_right_is_named():
  cross = {"used": 0.1, "calibrated": 2.0, "loss": 3.0, "calibrated_loss": 1.0}
  late = {"used": 0.25, "calibrated": 0.6, "loss": 2.2, "calibrated_loss": 1.6}
  heat = {"dual": cross, "late": late, "cross": cross}
  first, second = recipe.surer_than_right(heat, PAPER, 8)
  assert first.startswith("temperature.late=0.25 makes")
  assert "(-log p of the positive 2.20 in dev lists of 8; all alike 2.08; its best is 1.60 at 0.6)" in first
  assert second.startswith("temperature.cross=0.1 makes")
  assert recipe.surer_than_right({"dual": cross, "late": late}, DUAL, 8) == []  # it teaches nothing
  assert recipe.surer_than_right({"late": late | {"loss": 2.0}}, PAPER, 8) == []


@pytest.mark.parametrize(
  ("ranked", "weights", "says"),
  [
    ({"student": 0.5, "late": 0.6, "teacher": 0.7}, PAPER, None),
    ({"student": 0.5, "late": 0.6, "teacher": 0.14}, PAPER, "at chance (MRR@10 0.140 "),
    ({"student": 0.1, "late": 0.1, "teacher": 0.14}, PAPER, "at chance"),
    ({"student": 0.5, "late": 0.6, "teacher": 0.55}, PAPER, "late interaction that it teaches (MRR@10 0.550 < 0.600"),
    ({"student": 0.5, "late": 0.6, "teacher": 0.55}, DUAL, None),
    ({"student": 0.5, "late": 0.6, "teacher": 0.45}, DUAL, "worse than its student (MRR@10 0.450 < 0.500"),
    ({"student": 0.5, "late": 0.6, "teacher": 0.65, "alone": 0.7}, PAPER, "set cascade.residual=False"),
    ({"student": 0.5, "late": 0.6, "teacher": 0.7, "alone": 0.65}, PAPER, None),
  ],
)
def test_a_poor_teacher_is_named(ranked, weights, says):
  warning = recipe.teacher_warning(ranked, [0.12, 0.14], weights, "here")
  assert warning is None if says is None else says in warning


@pytest.mark.parametrize(
  ("use", "expected"),
  [("mined", [[4, 0], []]), ("given", [[1, 0, 3], [2]]), ("both", [[4, 0, 1, 3], [2]])],
)
def test_negatives_come_from_where_the_configuration_says(tmp_path, use, expected):
  corpus = types.SimpleNamespace(lookup=columns.Lookup.of([f"p{i}" for i in range(5)]))
  given = columns.ragged([np.array([1, 0, 3], np.int32), np.array([2], np.int32)])
  queries = recipe.datasets.Queries(["q0", "q1"], ["x", "y"], columns.ragged([np.array([2], np.int32)] * 2), given)
  path = tmp_path / "negatives.trec"
  evaluate.write_run({"q0": {"p0": 0.1, "p4": 0.9}}, path, "mined")
  data = recipe.datasets.Dataset(corpus, {"train": queries}, "")
  settings = recipe.config.Config(mine=recipe.config.Mine(use=use))
  current = types.SimpleNamespace(config=settings, data=data)
  assert [found.tolist() for found in recipe.hard(current, path)] == expected
  if use != "given":
    evaluate.write_run({"q0": {"p9": 0.1}}, path, "mined")
    with pytest.raises(recipe.UserError, match="names passages that the corpus lacks"):
      recipe.hard(current, path)


def test_the_verb_mine_is_its_definition(whole, tmp_path, capsys):
  """The student's ranking without known positives; without what its cross-encoder scores too high; a part of it."""
  directory, _ = whole
  plain, denoised, sample = (tmp_path / f"{name}.trec" for name in ("plain", "denoised", "sample"))
  command = ["mine", str(directory), "--split", "dev", "--first", "2", "--last", "9"]
  assert main([*command, "--margin", "None", "--output", str(plain)]) == 0
  assert [p.name for p in tmp_path.iterdir()] == ["plain.trec"]  # the cross-encoder read nothing
  found, qrels = evaluate.read_run(plain), evaluate.read_qrels(directory / "prepare" / "qrels.dev.trec")
  ranking = evaluate.read_run(directory / "runs" / f"dev.dual.{Searcher(directory).corpus.directory.name}.trec")
  assert set(found) == set(qrels)
  for query, own in found.items():
    assert list(own) == [p for p in evaluate.ranked(ranking[query]) if p not in qrels[query]][1:9]
  # Everything is read and nothing dropped; then what two thresholds in the midst of these logits say.
  assert main([*command, "--margin=-inf", "--output", str(denoised)]) == 0
  assert evaluate.read_run(denoised) == found
  logits = evaluate.read_run(tmp_path / "denoised.cross.trec")
  best = {query: max(logits[query][p] for p in qrels[query]) for query in found}
  every = sorted(logits[query][p] for query, own in found.items() for p in own)
  below = sorted(best[query] - logits[query][p] for query, own in found.items() for p in own)
  limit, margin = (float(np.mean(x[len(x) // 2 : len(x) // 2 + 2])) for x in (every, below))
  flags = ["--denoise", str(1 / (1 + np.exp(-limit))), f"--margin={margin}"]
  assert main([*command, *flags, "--output", str(denoised)]) == 0
  kept, again = evaluate.read_run(denoised), evaluate.read_run(tmp_path / "denoised.cross.trec")
  assert again == logits
  high, near = 0, 0
  for query, own in found.items():
    assert logits[query].keys() == own.keys() | qrels[query].keys()
    wrong = [logits[query][p] > limit for p in own]
    close = [logits[query][p] > best[query] - margin for p in own]
    assert list(kept.get(query, {})) == [p for p, a, b in zip(own, wrong, close) if not a and not b]
    high, near = high + sum(wrong), near + sum(b and not a for a, b in zip(wrong, close))
  assert high > 0
  assert near > 0
  said = capsys.readouterr().out
  assert f"{high:,} by probability, {near:,} by margin" in said
  assert main([*command, "--sample", "3", "--margin", "None", "--output", str(sample)]) == 0
  for query, own in evaluate.read_run(sample).items():
    assert len(own) == 3
    assert own.items() <= found[query].items()


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    (["--first", "5", "--last", "4"], "mine.first=5: must lie in 1..mine.last=4"),
    (["--output", "/nowhere/negatives.trec"], "/nowhere/negatives.trec: cannot be written"),
    (["--margin", "99"], "no hard negative is left"),
  ],
)
def test_a_mistake_in_mining_is_one_line(whole, flags, says, tmp_path, monkeypatch, capsys):
  directory, _ = whole
  monkeypatch.chdir(tmp_path)
  assert main(["mine", str(directory), "--split", "dev", *flags]) == 2
  assert says in capsys.readouterr().err.splitlines()[-1]
  assert not list(tmp_path.iterdir())


def test_search_finds_a_passage_by_its_own_words(whole, capsys):
  directory, _ = whole
  searcher = Searcher(directory)
  count = len(searcher.corpus.vectors)
  rows = range(0, count, 100)
  queries = [columns.passage(hit.title, hit.text) for hit in (searcher.hit(row, 0) for row in rows)]
  hits = sum(row in [hit.row for hit in found] for row, found in zip(rows, searcher.search(queries, 10)))
  assert hits > count / 200
  assert main(["search", str(directory), "sort a list", "--k", "3"]) == 0
  printed = capsys.readouterr().out.splitlines()
  assert len([line for line in printed if line.strip()[0] in "123"]) >= 3


def test_search_equals_the_run_file(whole):
  """The same query gives the passages and scores that the evaluation found."""
  directory, _ = whole
  results = json.loads((directory / "metrics.json").read_text())
  run = evaluate.read_run(directory / "runs" / f"test.dual.{results['best_stage']}.trec")
  queries = recipe.datasets.load(
    recipe.checkpoints.config.Data(packages=("python",), cache=str(directory.parent / "cache"))
  )
  test = queries.queries["test"]
  searcher = Searcher(directory)
  for name, hits in zip(test.ids[:5], searcher.search(test.texts[:5], 10)):
    found = {hit.id: hit.score for hit in hits}
    np.testing.assert_allclose(list(found.values()), [run[name][p] for p in found], atol=1e-4)


# `benchmarks/faults.py` kills in every stage, and during saves. Here both signals meet stages of both kinds.
INTERRUPTIONS = {
  "prepare": signal.SIGINT,
  "baselines": signal.SIGINT,
  "post": signal.SIGKILL,
  "interaction": signal.SIGKILL,
  "mine": signal.SIGKILL,
  "warmup": signal.SIGINT,
  "check": signal.SIGINT,
  "denoise": signal.SIGINT,
  "cascade": signal.SIGKILL,
  "encode": signal.SIGINT,
  "evaluate": signal.SIGKILL,
}


def lines(path: Path) -> int:
  return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.timeout(900)
def test_no_interruption_changes_the_result(whole, place, capsys):
  expected, _ = whole
  assert tuple(INTERRUPTIONS) == recipe.STAGES
  output = place / "broken"
  log = Path(f"{output}.log")
  for stage, how in INTERRUPTIONS.items():
    log.write_text("")
    before = lines(output / stage / "log.jsonl")
    process = begin(place, output)
    while process.poll() is None:
      started = f"{stage}\n" in log.read_text()
      if started and (stage not in recipe.TRAINED or lines(output / stage / "log.jsonl") >= before + 2):
        break
      time.sleep(0.01)
    process.send_signal(how)
    process.communicate()
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), (stage, log.read_text())
    assert "Traceback" not in log.read_text(), (stage, log.read_text())
  log.write_text("")
  process = begin(place, output)
  process.communicate()
  assert process.returncode == 0, log.read_text()
  assert json.loads((output / "metrics.json").read_text()) == json.loads((expected / "metrics.json").read_text())
  assert (output / "model" / "model.safetensors").read_bytes() == (
    expected / "model" / "model.safetensors"
  ).read_bytes()
  for stage in recipe.TRAINED:
    log_lines = lambda directory: (directory / stage / "log.jsonl").read_text().splitlines()
    terms = lambda directory: [json.loads(line)["terms"] for line in log_lines(directory)]
    assert terms(output) == terms(expected)
  # Given once more, the command finds everything done.
  command = ["run", *TINY, "--output", str(output)]
  assert main([*command, "--data.cache", str(place / "cache")]) == 0
  assert capsys.readouterr().err.count("done before") == len(recipe.STAGES) - 1  # prepare loads the data in any case


def test_another_configuration_in_the_same_folder_is_refused(whole, capsys):
  directory, _ = whole
  assert main(["run", *TINY, "--output", str(directory), "--seed", "3"]) == 2
  message = capsys.readouterr().err
  assert "holds a run with" in message
  assert message.count("\n") == 1


def test_a_run_that_began_with_other_weights_is_not_continued(whole, capsys):
  directory, _ = whole
  path = directory / "prepare" / "manifest.json"
  raw = path.read_text()
  changed = json.loads(raw)
  changed["begun"]["weights"] = ["0123456789abcdef", "random"]
  try:
    path.write_text(json.dumps(changed))
    command = ["run", *TINY, "--output", str(directory)]
    assert main([*command, "--data.cache", str(directory.parent / "cache")]) == 2
  finally:
    path.write_text(raw)
  assert "weights changed since this run began" in capsys.readouterr().err


@pytest.mark.parametrize(
  "name", ["model/model.json", "model/model.safetensors", "vectors/00000.npy", "prepare/passages/texts/values.bin"]
)
def test_search_names_a_damaged_file(whole, name, capsys):
  directory, _ = whole
  path = directory / name
  if name == "vectors/00000.npy":
    path = directory / recipe.checkpoints.load_model(directory / "model")[2]["corpus"] / name
  raw = path.read_bytes()
  try:
    path.write_bytes(raw[: len(raw) // 2])
    assert main(["search", str(directory), "sort a list"]) == 2
  finally:
    path.write_bytes(raw)
  message = capsys.readouterr().err
  assert path.parent.name in message
  assert message.count("\n") == 1


def test_a_run_from_before_a_field_was_there_continues(tmp_path):
  """What its configuration does not have is what it had: the default."""
  recipe.claim(tmp_path / "run", config.Config(), fresh=False)
  path = tmp_path / "run" / "config.json"
  old = json.loads(path.read_text())
  del old["model"]["start_layers"], old["model"]["dual_width"]
  old["cascade"]["optimizer"]["shard"] = False  # was one once
  path.write_text(json.dumps(old))
  recipe.claim(tmp_path / "run", config.Config(), fresh=False)
  with pytest.raises(config.UserError, match=r"holds a run with model\.dual_width=None, not 8"):
    recipe.claim(tmp_path / "run", config.Config(model=config.Model(dual_width=8)), fresh=False)


def test_what_bounds_memory_may_change_in_a_run_unless_it_changes_what_is_in_a_batch(tmp_path):
  """After a stage that found too little memory the earlier ones are kept."""
  held = dataclasses.replace(config.Config().cascade, recompute=False)
  small = dict(model=config.Model(remat=True, scan=False), cascade=dataclasses.replace(held, chunk=8))
  for pack in (None, 128):
    place, data = tmp_path / str(pack), config.Data(pack=pack)
    recipe.claim(place, config.Config(data=data), fresh=False)
    before = (place / "config.json").read_bytes()
    other = config.Config(data=data, **small)
    if pack:  # a chunk's texts are packed together
      with pytest.raises(config.UserError, match=r"holds a run with cascade\.chunk=None, not 8"):
        recipe.claim(place, other, fresh=False, goes_on=True)
      assert (place / "config.json").read_bytes() == before
      other = dataclasses.replace(other, cascade=held)
    with pytest.raises(config.UserError, match=r"holds a run with"):  # as of an ablation's rows, which must be alike
      recipe.claim(place, other, fresh=False)
    recipe.claim(place, other, fresh=False, goes_on=True)
    assert json.loads((place / "config.json").read_text()) == json.loads(json.dumps(dataclasses.asdict(other)))
