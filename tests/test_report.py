"""The page holds the numbers of the files, escapes what it is given and asks for what is missing."""

import base64
import dataclasses
import html.parser
import itertools
import json
import math
import os
import re
import statistics

import numpy as np
import pytest

from ernie_jax import collection, config, draw, evaluate, report
from ernie_jax.__main__ import main
from ernie_jax.config import UserError

RESULTS = {
  "bm25": {"MRR@10": 0.5461, "R@20": 0.8262, "nDCG@10": 0.5873},
  "zero_shot": {"MRR@10": 0.0214, "R@20": 0.0465, "nDCG@10": 0.0256},
  "dual": {"MRR@10": 0.5817, "R@20": 0.8618, "nDCG@10": 0.6299},
  "late": {"MRR@10": 0.5941, "R@20": 0.8722, "nDCG@10": 0.6413},
  "cross": {"MRR@10": 0.5734, "R@20": 0.8585, "nDCG@10": 0.6206},
}
MORE = {
  "depth": {"late": 97, "cross": 53},
  "stages": {"interaction": {"dual": {"MRR@10": 0.3331}}, "cascade": {"dual": {"MRR@10": 0.4442}}},
  "dual_minus_bm25": {"MRR@10": [0.0356, 0.0061, 0.0649]},
}
MANIFEST = {
  "config": {"data": {"name": "<script>alert(1)</script>"}, "cascade": {"optimizer": {"clip": 1.0}}},
  "seed": 0,
  "data": {"fingerprint": "f1a9", "passages": 7508, "queries": {"train": 6381, "dev": 376, "test": 751}},
  "start": "from & scratch",
  "stages": {"prepare": {"seconds": 12.3}, "cascade": {"seconds": 7384, "steps": 4321, "note": "<b>"}},
  "best_stage": "cascade",
  "teacher_check": {
    "depth": 20, "student": {"MRR@10": 0.5551}, "teacher": {"MRR@10": 0.4441}, "warning": "teacher < student"
  },
}  # fmt: skip


def leave(directory, results=RESULTS | MORE, manifest=MANIFEST, steps=40, stages=("interaction", "cascade")):
  """The files that a run leaves."""
  (directory / "metrics.json").write_text(json.dumps(results))
  if manifest is not None:
    (directory / "manifest.json").write_text(json.dumps(manifest))
  for stage in stages:
    (directory / stage).mkdir()
    with open(directory / stage / "log.jsonl", "w") as file:
      for step in range(1, steps + 1):
        terms = {"nll_de": 4 / step, "kl_li_de": 0.5}
        record = {
          "step": step,
          "terms": terms,
          "total": 4 / step + 0.5,
          "gradient_norm": 1.0,
          "learning_rate": 0.0,
        }
        file.write(json.dumps(record) + "\n")
  return directory


def page(directory):
  return report.write_report(directory).read_text()


def visible(text):
  """What a reader sees: no tags, no style, white space collapsed."""
  text = re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<style>.*?</style>", "", text))
  return " ".join(html.unescape(text).split())


class Nesting(html.parser.HTMLParser):
  """Fails unless every tag that opens is closed in order."""

  VOID = {"meta", "line"}

  def __init__(self):
    super().__init__()
    self.open, self.tags = [], set()

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.add(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_every_number_is_there(tmp_path):
  text = visible(page(leave(tmp_path)))
  for row in RESULTS.values():
    for value in row.values():
      assert f"{value:.3f}" in text
  for part in ("+0.036", "+0.006 to +0.065", "0.333", "0.444", "best 97", "best 53"):
    assert part in text
  for part in (
    "0.555",
    "0.444",
    "teacher < student",
    "12.3 s",
    "2 h 03 min",
    "4,321",
    "f1a9",
    "from & scratch",
  ):
    assert part in text
  for part in ("7,508", "6,381 train, 376 dev, 751 test", "cascade.optimizer.clip = 1.0"):
    assert part in text
  for part in ("nll_de", "kl_li_de", "Training: interaction", "Training: cascade"):
    assert part in text


def test_headline(tmp_path):
  text = visible(page(leave(tmp_path)))
  assert (
    "The dual-encoder reaches MRR@10 0.582 on 751 test queries over 7,508 passages, 0.036 above BM25 at 0.546" in text
  )
  assert "chance" not in text
  results = RESULTS | {"dual_minus_bm25": {"MRR@10": [-0.01, -0.03, 0.01]}}
  text = visible(page(leave(tmp_path, results, stages=())))
  assert "0.010 below BM25" in text
  assert "chance" in text


def test_the_best_of_each_column_is_marked(tmp_path):
  best = re.findall(r"<td class=best>(.*?)</td>", page(leave(tmp_path)))
  assert best == ["0.594", "0.872", "0.641"]


def test_well_formed_self_contained_and_escaped(tmp_path):
  text = page(leave(tmp_path))
  nesting = Nesting()
  nesting.feed(text)
  assert nesting.open == []
  assert {"svg", "table", "details"} <= nesting.tags
  assert not {"script", "link", "img", "iframe"} & nesting.tags
  assert "<script" not in text
  assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
  assert "note <b>" not in text  # only numbers stand beside a time
  assert "://" not in text


def test_a_few_results_are_enough(tmp_path):
  text = page(leave(tmp_path, {"bm25": {"MRR@10": 0.25}}, manifest=None, stages=()))
  assert "0.250" in visible(text)
  assert "Training" not in text
  assert "Configuration" not in text


@pytest.mark.parametrize("path", [["dual"], ["dual", "MRR@10"], ["dual_minus_bm25", "MRR@10"], ["depth"], ["stages"]])
@pytest.mark.parametrize("value", [None, "text", 1, [], {}, math.nan])
def test_any_result_may_be_missing_or_odd(tmp_path, path, value):
  results = json.loads(json.dumps(RESULTS | MORE))
  node = results
  for key in path[:-1]:
    node = node[key]
  node[path[-1]] = value
  assert "Results" in page(leave(tmp_path, results, stages=()))


@pytest.mark.parametrize("key", MANIFEST)
@pytest.mark.parametrize("value", [None, "text", 1, [], {}])
def test_any_part_of_the_manifest_may_be_missing_or_odd(tmp_path, key, value):
  assert "Results" in page(leave(tmp_path, manifest=MANIFEST | {key: value}, stages=()))


def test_values_that_are_not_finite_are_counted(tmp_path):
  leave(tmp_path, stages=())
  (tmp_path / "cascade").mkdir()
  values = [1.0, math.nan, 2.0, math.inf, 3.0]
  lines = [json.dumps({"step": i, "terms": {"nll_de": x, "nll_li": math.nan}}) for i, x in enumerate(values)]
  (tmp_path / "cascade" / "log.jsonl").write_text("\n".join(lines))
  text = page(tmp_path)
  assert "2 values not finite" in text
  assert "5 values not finite" in text
  assert "nan" not in text


@pytest.mark.parametrize("values", [[0.0], [5.0], [-1.0, -1.0], [1e-30, 2e-30], [-3.0, 1e6], [0.1] * 1000])
def test_a_curve_stays_inside_its_frame(values):
  points = [(float(i), y) for i, y in enumerate(values)]
  svg = draw.chart("term", {"": points}, (0, points[-1][0]))
  drawn = [pair.split(",") for line in re.findall(r'points="(.*?)"', svg) for pair in line.split()]
  assert 1 <= len(drawn) <= 600
  for x, y in drawn:
    assert 0 <= float(x) <= 300
    assert 0 <= float(y) <= 150


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 4.7), (-3, 8), (999, 1001), (2e-5, 2e-5), (0, 0), (-1, -1)])
def test_ticks_enclose_and_are_few(low, high):
  ticks = draw.ticks(low, high)
  assert ticks[0] <= low + 1e-9
  assert high <= ticks[-1] + 1e-9
  assert 2 <= len(ticks) <= 5
  assert [b - a for a, b in itertools.pairwise(ticks)] == pytest.approx([ticks[1] - ticks[0]] * (len(ticks) - 1))


def test_missing_results(tmp_path):
  with pytest.raises(UserError, match=r"metrics\.json: no such file.*ernie-jax run"):
    report.write_report(tmp_path)
  with pytest.raises(UserError, match=r"metrics\.json: no such file"):
    report.write_report(tmp_path / "nowhere")
  assert os.listdir(tmp_path) == []


def test_damaged_files(tmp_path):
  leave(tmp_path)
  report.write_report(tmp_path)
  older = (tmp_path / "report.html").read_bytes()
  for name, content, where in (
    ("metrics.json", b'{\n"bm25": }', "metrics.json:2"),
    ("metrics.json", b'{"\xff": 1}', "metrics.json: "),
    ("manifest.json", b"", "manifest.json:1"),
    ("cascade/log.jsonl", b'{"step": 1}\n{"step": 2, "te', "log.jsonl:2"),
    ("cascade/log.jsonl", b'{"step": 1}\n\xff', "log.jsonl:2"),
    ("cascade/log.jsonl", b'{"total": 1}\n', "log.jsonl:1"),
  ):
    before = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
      report.write_report(tmp_path)
    assert str(tmp_path / where) in str(error.value).replace(str(tmp_path / "cascade"), str(tmp_path))
    assert (tmp_path / "report.html").read_bytes() == older
    (tmp_path / name).write_bytes(before)
  assert sorted(os.listdir(tmp_path)) == [
    "cascade",
    "interaction",
    "manifest.json",
    "metrics.json",
    "report.html",
  ]


# Samples

HOSTILE = "<script>alert(1)</script> & \"'<img src=x onerror=alert(1)>"


def leave_rankings(directory, queries=40, passages=25, depth=8):
  """A run's rankings, drawn at random, with texts that would break a page; (ranks by hand, {query: its text})."""
  rng = np.random.default_rng(0)
  names = [f"p{i:02}" for i in rng.permutation(passages)]
  titles = [f"title {name} {HOSTILE}" for name in names]
  collection.write_texts(directory / "prepare", names, titles, [f"text {n} {HOSTILE} " * 9 for n in names], "f1a9")
  asked = {f"q{i:02}": f"query {i} {HOSTILE}" for i in range(queries)}
  evaluate.write_queries(asked.items(), directory / "prepare" / "queries.test.tsv")
  qrels = {query: dict.fromkeys(rng.choice(names, 2, replace=False).tolist(), 1) for query in asked}
  evaluate.write_qrels(qrels, directory / "prepare" / "qrels.test.trec")
  (directory / "runs").mkdir()
  places = {}
  for system, file in (("dual", "dual.cascade"), ("late", "late.cascade"), ("cross", "cross")):
    run = {}
    for query in asked:
      order = rng.permutation(names).tolist()[: depth if system == "cross" else None]
      run[query] = {name: float(len(order) - i) for i, name in enumerate(order)}
      found = [i + 1 for i, name in enumerate(order) if name in qrels[query]]
      places.setdefault(query, {})[system] = min(found) if found else None
    evaluate.write_run(run, directory / "runs" / f"test.{file}.trec", system)
  return places, asked


def samples(text):
  """[(heading, query, {ranker: what stands below its name})] in the order of the page."""
  found = []
  for kind, block in re.findall(r"(?s)<h3 class=kind>(.*?)</h3>(.*?)(?=<h3 class=kind>|<p class=note>)", text):
    for query, items in re.findall(r"(?s)<p class=asked>(.*?)</p><dl class=found>(.*?)</dl>", block):
      ranks = dict(re.findall(r"<b>([^<]*)</b>(positive [^<]*)</dt>", items))
      found.append((kind, html.unescape(query), ranks))
    if "class=sample" not in block:
      found.append((kind, None, {}))
  return found


def test_samples_are_where_the_ranks_by_hand_differ_most(tmp_path):
  places, asked = leave_rankings(leave(tmp_path, stages=()))
  found = samples(page(tmp_path))
  seen = set()
  for right, wrong, count in (("cross", "dual", 2), ("dual", "cross", 2), ("late", "dual", 1), ("dual", "late", 1)):
    every = [q for q, own in places.items() if own[right] == 1 and own[wrong] is not None and own[wrong] > 1]
    assert every  # else nothing is tested
    best = sorted(set(every) - seen, key=lambda q: (-places[q][wrong], q))[:count]
    seen |= set(best)
    for query in best:
      kind, shown, ranks = found.pop(0)
      assert kind.lower() == (
        f"{report.NAMES[right]} right, {report.NAMES[wrong]} wrong: {len(every)} of {len(asked)} queries".lower()
      )
      assert shown == asked[query]
      for system, rank in places[query].items():
        expected = f"positive at rank {rank}" if rank else "positive not in its 8"
        assert ranks[report.NAMES[system]] == expected
  assert found == []


def test_texts_of_others_are_shown_as_text(tmp_path):
  leave_rankings(leave(tmp_path, stages=()))
  text = page(tmp_path)
  nesting = Nesting()
  nesting.feed(text)
  assert nesting.open == []
  assert not {"script", "img"} & nesting.tags
  assert visible(text).count(HOSTILE) > 6


@pytest.mark.parametrize("lost", ["runs/test.cross.trec", "prepare/queries.test.tsv", "prepare/qrels.test.trec"])
def test_without_their_files_samples_are_left_out(tmp_path, lost):
  leave_rankings(leave(tmp_path, stages=()))
  assert "class=sample" in page(tmp_path)
  (tmp_path / lost).unlink()
  assert "class=sample" not in page(tmp_path)


# Attention maps

PAIR = {
  "query_tokens": ["<b>", "##s"],
  "passage_tokens": ["a", "&", "c"],
  "more": 7,
  "before": {"cross": [[0.125, 0.25, 0.5, 0.125], [0.1, 0.2, 0.3, 0.4]], "late": [[1, 0, 0, 0], [0, 0, 0.001, 0.999]]},
  "after": {"cross": [[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]], "late": [[0.4, 0.3, 0.2, 0.1], [0, 1, 0, 0]]},
  "query": "q1", "text": HOSTILE, "passage": "p1",
}  # fmt: skip
PAIR["before"]["kl"], PAIR["after"]["kl"] = 2.5, 1.25


def leave_maps(directory, pair=PAIR):
  (directory / "evaluate").mkdir(exist_ok=True)
  content = json.dumps({"temperature": 0.1, "pairs": [pair]})
  (directory / "evaluate" / "attention.json").write_text(content)
  return directory


def test_every_cell_of_a_map_is_drawn_with_its_number(tmp_path):
  text = page(leave_maps(leave(tmp_path, stages=())))
  maps = re.findall(r"<table class=map>(.*?)</table>", text)
  titles = ["Before: cross-encoder", "Before: late interaction", "After: cross-encoder", "After: late interaction"]
  for (when, who), title, drawn in zip(itertools.product(("before", "after"), ("cross", "late")), titles, maps):
    assert f"<caption>{title}</caption>" in drawn
    cells = re.findall(r'--a:(\d+)%" title="(.*?)"', drawn)
    values = [x for row in PAIR[when][who] for x in row]
    assert [number for _, number in cells] == [f"{x:.3f}" for x in values]
    # 1 is the largest value outside the last column, which is what all other tokens get.
    assert [int(share) for share, _ in cells] == [round(100 * math.sqrt(x)) for x in values]
    assert re.findall(r"<th scope=row>(.*?)</th>", drawn) == ["&lt;b&gt;", "##s"]
    assert re.findall(r"<span>(.*?)</span>", drawn) == ["a", "&amp;", "c", "+ 7 more"]
  assert len(maps) == 4
  assert "KL from 2.500 to 1.250" in visible(text)
  assert HOSTILE in visible(text)
  nesting = Nesting()
  nesting.feed(text)
  assert nesting.open == []
  assert "script" not in nesting.tags


def test_maps_that_the_cascade_did_not_change_are_drawn_once(tmp_path):
  text = page(leave_maps(leave(tmp_path, stages=()), PAIR | {"after": PAIR["before"]}))
  assert text.count("<table class=map>") == 2
  assert "Before:" not in text


def test_damaged_maps(tmp_path):
  leave(tmp_path, stages=())
  for pair in (
    {**PAIR, "more": 0},  # rows are one cell too long then
    {**PAIR, "query_tokens": ["a"]},
    {**PAIR, "before": {**PAIR["before"], "cross": [["x"] * 4] * 2}},
    {key: value for key, value in PAIR.items() if key != "after"},
    None,
  ):
    leave_maps(tmp_path, pair)
    with pytest.raises(UserError, match=r"attention\.json: no attention maps"):
      report.write_report(tmp_path)
  (tmp_path / "evaluate" / "attention.json").write_text('{"pairs": [\n')
  with pytest.raises(UserError, match=r"attention\.json:2: not JSON"):
    report.write_report(tmp_path)
  assert not (tmp_path / "report.html").exists()


# Several runs


def leave_several(place, **changes):
  """A run for each name, {name: (fields of its configuration, MRR@10 of its dual-encoder)}."""
  settings = json.loads(json.dumps(dataclasses.asdict(config.Config())))
  for name, (fields, value) in changes.items():
    own = json.loads(json.dumps(settings))
    for path, x in fields.items():
      *parents, last = path.split(".")
      node = own
      for key in parents:
        node = node[key]
      node[last] = x
    (place / name).mkdir()
    results = RESULTS | {"dual": RESULTS["dual"] | {"MRR@10": value}}
    leave(place / name, results, MANIFEST | {"config": own, "seed": own["seed"]}, stages=("cascade",))
  return [place / name for name in changes]


SEVERAL = {
  "first": ({}, 0.5),
  "second": ({"seed": 1}, 0.6),
  "third": ({"seed": 2}, 0.55),
  "wide": ({"cascade.batch": 96, "data.name": HOSTILE}, 0.7),
}


def test_seeds_have_a_mean_and_a_deviation(tmp_path):
  runs = leave_several(tmp_path, **SEVERAL)
  text = visible(report.write_comparison(runs, tmp_path / "page.html").read_text())
  values = [value for _, value in list(SEVERAL.values())[:3]]
  assert f"first, second, third 3 seeds {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in text
  assert "wide 0.700" in text
  assert "The best dual-encoder reaches MRR@10 0.700 : wide." in text
  assert "all runs 0.546" in text  # BM25's row
  assert report.spread([0.25, None, math.nan, 0.75]) == f"0.500 ± {statistics.stdev([0.25, 0.75]):.3f}"
  assert report.spread([None, 0.25]) == "0.250"
  assert report.spread([]) == "–"


def test_exactly_the_settings_that_differ_are_listed(tmp_path):
  runs = [report._load(path) for path in leave_several(tmp_path, **SEVERAL)]
  assert report.differences(runs) == {
    "seed": ["0", "1", "2", "0"],
    "data.name": [*[json.dumps(config.Config().data.name)] * 3, json.dumps(HOSTILE)],
    "cascade.batch": [*[str(config.Config().cascade.batch)] * 3, "96"],
  }
  # A field that an older run does not have yet has its default; one that only it has, or no manifest, is a dash.
  older = dict(runs[0].settings)
  del older["mine.refresh"]
  older["cascade.gone"] = None
  old = dataclasses.replace(runs[0], settings=older)
  assert report.differences([runs[0], old]) == {"cascade.gone": ["–", "null"]}
  silent = dataclasses.replace(runs[0], settings={})
  assert report.differences([runs[0], silent]).keys() == runs[0].settings.keys()
  assert report.differences([runs[0], runs[0]]) == {}


def test_runs_alike_but_for_the_seed_are_a_group(tmp_path):
  runs = {path.name: report._load(path) for path in leave_several(tmp_path, **SEVERAL)}
  assert report.groups(runs) == [["first", "second", "third"], ["wide"]]
  other = dataclasses.replace(runs["second"], manifest=runs["second"].manifest | {"data": {"fingerprint": "other"}})
  assert report.groups(runs | {"second": other}) == [["first", "third"], ["second"], ["wide"]]
  unknown = {name: dataclasses.replace(run, settings={}) for name, run in runs.items()}
  assert report.groups(unknown) == [[name] for name in runs]


def test_a_comparison_is_well_formed_and_draws_every_run(tmp_path):
  runs = leave_several(tmp_path, **SEVERAL)
  text = report.write_comparison(runs, tmp_path / "page.html").read_text()
  nesting = Nesting()
  nesting.feed(text)
  assert nesting.open == []
  assert not {"script", "link", "img", "iframe"} & nesting.tags
  charts = re.findall(r"<figure>.*?</figure>", text.split("<h2>Each run</h2>")[0])
  assert len(charts) == 5  # total, two terms, gradient norm, learning rate
  for chart in charts:
    assert [name for name in SEVERAL if f"<title>{name} from" in chart] == list(SEVERAL)
    assert len(set(re.findall(r'polyline class="smooth (.*?)"', chart))) == len(runs)
  assert text.count("<details class=run>") == len(runs)
  (tmp_path / "wide" / "manifest.json").write_text(json.dumps(MANIFEST | {"data": {"fingerprint": "other"}}))
  text = visible(report.write_comparison(runs, tmp_path / "page.html").read_text())
  assert "Warning. These runs are of different data" in text
  assert "The best dual-encoder" not in text


def test_twelve_lines_look_different():
  assert len({draw.look(i) for i in range(12)}) == 12


# Ablations

TABLE = """| row | DE MRR@10 | p |
| --- | --: | --: |
| full | 0.641 ± 0.008 | – |
| <script>alert(1)</script> | 0.123 |  |

675 test queries <b>over</b> 6,322 passages.

Left out: `post`: nothing & more.
"""
PLOT = "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"


def leave_ablation(directory, table=TABLE):
  directory.mkdir(exist_ok=True)
  (directory / "ablation.json").write_text(json.dumps({"config": {"seed": 7}, "rows": []}))
  (directory / "ablation.md").write_text(table)
  (directory / "ablation.svg").write_text(PLOT)
  return directory


def test_an_ablation_is_its_table_its_words_and_its_plot(tmp_path):
  text = report.write_report(leave_ablation(tmp_path / "abl")).read_text()
  rows = re.findall(r"<tr><th scope=row>(.*?)</th>(.*?)</tr>", text)
  cells = [[name, *re.findall(r"<td>(.*?)</td>", own)] for name, own in rows]
  assert cells == [["full", "0.641 ± 0.008", "–"], ["&lt;script&gt;alert(1)&lt;/script&gt;", "0.123", ""]]
  assert "675 test queries <b>over</b> 6,322 passages." in visible(text)
  assert "Left out: post: nothing & more." in visible(text)
  assert "seed = 7" in text
  assert "<script" not in text
  assert [base64.b64decode(x).decode() for x in re.findall('src="data:image/svg\\+xml;base64,(.*?)"', text)] == [PLOT]
  both = report.write_comparison(
    [tmp_path / "abl", *leave_several(tmp_path, first=({}, 0.5))], tmp_path / "page.html"
  ).read_text()
  assert "<h1>1 run and 1 ablation</h1>" in both
  assert all(part in both for part in ("Ablation: abl", "0.641 ± 0.008", "0.500"))


# The command


def test_the_command(tmp_path, capsys, monkeypatch):
  one, other = leave_several(tmp_path, one=({}, 0.5), other=({}, 0.6))
  monkeypatch.chdir(tmp_path)
  assert main(["report", str(one)]) == 0
  assert capsys.readouterr().out.strip() == str(one / "report.html")
  assert main(["report", str(one), "--output", "x.html"]) == 0
  assert (tmp_path / "x.html").read_bytes() == (one / "report.html").read_bytes()
  assert main(["report", str(one), str(other)]) == 0
  assert "<h1>2 runs</h1>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
  ("command", "words"),
  [
    ([], "name a finished run"),
    (["nowhere"], "nowhere/metrics.json: no such file"),
    (["one", "empty"], "empty/metrics.json: no such file"),
    (["one", "./one"], "one: is given twice"),
    (["one", "--output", "missing/page.html"], "--output missing/page.html: cannot be a file there"),
    (["one", "--output", "empty"], "--output empty: cannot be a file there"),
    (["damaged"], "damaged/metrics.json:2: not JSON"),
    (["cut"], "cut/ablation.md:3: 2 cells, not 3"),
    (["untold"], "untold/ablation.md: no such file"),
    (["broken", "one"], "broken/ablation.json:1: not JSON"),
  ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, command, words):
  leave_several(tmp_path, one=({}, 0.5))
  (tmp_path / "empty").mkdir()
  (tmp_path / "damaged").mkdir()
  (tmp_path / "damaged" / "metrics.json").write_text('{\n"bm25": }')
  leave_ablation(tmp_path / "cut", "| a | b | c |\n| - | - | - |\n| 1 | 2 |\n")
  (leave_ablation(tmp_path / "untold") / "ablation.md").unlink()
  (leave_ablation(tmp_path / "broken") / "ablation.json").write_text("{")
  monkeypatch.chdir(tmp_path)
  assert main(["report", *command]) == 2
  said = capsys.readouterr().err
  assert words in said
  assert said.count("\n") == 1
  assert not list(tmp_path.rglob("*.html"))
