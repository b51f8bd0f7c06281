"""The page holds the numbers of the files, escapes what it is given and asks for what is missing."""

import html.parser
import itertools
import json
import math
import os
import re

import pytest

from ernie_jax import report
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
  svg = report._chart("term", points, (0, points[-1][0]))
  drawn = [pair.split(",") for line in re.findall(r'points="(.*?)"', svg) for pair in line.split()]
  assert 1 <= len(drawn) <= 600
  for x, y in drawn:
    assert 0 <= float(x) <= 300
    assert 0 <= float(y) <= 150


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 4.7), (-3, 8), (999, 1001), (2e-5, 2e-5), (0, 0), (-1, -1)])
def test_ticks_enclose_and_are_few(low, high):
  ticks = report._ticks(low, high)
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
