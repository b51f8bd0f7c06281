"""One page that shows what runs did: results, curves, samples, attention maps, times, configuration.

Reads the files that runs and ablations leave and writes one HTML file without scripts: of one run everything that there
is to see, of several their results side by side, what they were told differently, and then each of them.
"""

from __future__ import annotations

import base64
import bisect
import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ernie_jax import collection, config, draw, evaluate
from ernie_jax.config import UserError, flat
from ernie_jax.draw import number, plain, section, text, three
from ernie_jax.evaluate import MEASURES, SYSTEMS

NAMES = {
  "bm25": "BM25",
  "zero_shot": "Zero-shot dual-encoder",
  "dual": "Dual-encoder",
  "late": "Late interaction",
  "cross": "Cross-encoder",
}
RANKERS = ("dual", "late", "cross")  # whose disagreements are shown
TRAINED = get_args(config.Stage)  # the stages that leave a log.jsonl
HEADLINE = "MRR@10"
SHOWN = 200  # characters of a passage
# Who is right where who is wrong, and of how many queries that is shown.
DISAGREEMENTS = (("cross", "dual", 2), ("dual", "cross", 2), ("late", "dual", 1), ("dual", "late", 1))

MAPS = """Each row shares out 1 among the passage's tokens: the cross-encoder's by its last layer's attention, averaged
over heads; late interaction's by a softmax of its matches at temperature {temperature:g}. Before and after the cascade,
for test queries drawn from the seed, each with a positive. KL, of the first from the second, is what the term
kl_attention brings down."""


@dataclasses.dataclass(frozen=True)
class Run:
  """What a finished run left."""

  directory: Path
  results: dict[str, Any]  # metrics.json
  manifest: dict[str, Any]  # manifest.json; empty if it is missing
  settings: dict[str, Any]  # its configuration by dotted names

  @property
  def data(self) -> dict[str, Any]:
    return _dict(self.manifest.get("data"))

  @property
  def alike(self) -> str:
    """The same for runs that differ in nothing but their seed."""
    settings = {name: value for name, value in self.settings.items() if name != "seed"}
    # Of a run that does not say its configuration nothing is known.
    own = settings or str(self.directory.resolve())
    return json.dumps([own, self.data.get("fingerprint"), self.manifest.get("start")], sort_keys=True)


def write_report(directory: str | Path, output: Path | None = None) -> Path:
  """Writes the page of one run, or of one ablation: `directory/report.html` unless `output` says otherwise.

  Of a run only `metrics.json` has to be there; what else is missing is left out. Raises `UserError` when it is not, and
  with `path:line` for a file that is damaged.
  """
  directory = Path(directory)
  name = directory.resolve().name
  if is_ablation(directory):
    title, lead, sections = "Ablation", "", _ablation(directory)
  else:
    run = _load(directory)
    title, lead, sections = "Retrieval run", _summary(run.results, run.manifest), _chapters(run)
  output = output or directory / "report.html"
  config.write(output, draw.page(f"{title} {name}", [_header(title, lead), *sections]))
  return output


def write_comparison(directories: Sequence[Path], output: Path) -> Path:
  """Writes one page of several runs and ablations; `UserError` as of `write_report`, and for one given twice."""
  for i, directory in enumerate(directories):
    if directory.resolve() in [other.resolve() for other in directories[:i]]:
      raise UserError(f"{directory}: is given twice; name each run once")
  ablations = [directory for directory in directories if is_ablation(directory)]
  runs = {_name(d, directories): _load(d) for d in directories if d not in ablations}
  sections = [*_comparison(runs), *(part for d in ablations for part in _ablation(d, f": {_name(d, directories)}"))]
  count = lambda n, what: f"{n} {what}{'s' if n > 1 else ''}" if n else ""
  title = " and ".join(filter(None, (count(len(runs), "run"), count(len(ablations), "ablation"))))
  config.write(output, draw.page(title, [_header(title, _best(runs)), *sections]))
  return output


def is_ablation(directory: Path) -> bool:
  """Whether `ernie-jax ablate` made the folder."""
  return (directory / "ablation.json").is_file()


def _header(title: str, lead: str) -> str:
  return f"<header><h1>{text(title)}</h1><p class=lead>{lead}</p></header>"


def _name(directory: Path, among: Sequence[Path]) -> str:
  """The folder's name, or the path that was given where two have the same name."""
  name = directory.resolve().name
  return name if [other.resolve().name for other in among].count(name) == 1 else str(directory)


def _load(directory: Path) -> Run:
  if not (directory / "metrics.json").is_file():
    raise UserError(f"{directory / 'metrics.json'}: no such file: `ernie-jax run` makes it; give that run's directory")
  manifest = _dict(_json(directory / "manifest.json")) if (directory / "manifest.json").is_file() else {}
  settings = flat(_dict(manifest.get("config")))
  return Run(directory, _dict(_json(directory / "metrics.json")), manifest, settings)


# One run: each chapter gives HTML, or nothing when the run left nothing to show


def _chapters(run: Run) -> list[str]:
  results, manifest, directory = run.results, run.manifest, run.directory
  return [
    section("Results", _results(results)),
    section(HEADLINE, _bars((NAMES[key], results.get(key), key == "dual") for key in SYSTEMS)),
    section("Student after each stage", _stages(results, manifest)),
    section("Is the teacher better than its student?", _teacher(_dict(manifest.get("teacher_check")))),
    *(section(f"Training: {stage}", _curves([directory / stage / "log.jsonl"], [""])) for stage in TRAINED),
    section("Where the rankers disagree", _samples(run)),
    section("Where the cross-encoder looks, and what late interaction matches", _attention(directory)),
    section("Time", _times(_dict(manifest.get("stages")))),
    section("Data and start", _facts(manifest)),
    section("Configuration", _configuration(run.settings)),
  ]


def _summary(results: dict, manifest: dict) -> str:
  """One sentence: the dual-encoder against BM25."""
  dual, bm25 = (number(_dict(results.get(key)).get(HEADLINE)) for key in ("dual", "bm25"))
  data = _dict(manifest.get("data"))
  queries, passages = number(_dict(data.get("queries")).get("test")), number(data.get("passages"))
  over = f" on {queries:,.0f} test queries" if queries is not None else ""
  over += f" over {passages:,.0f} passages" if passages is not None else ""
  if dual is None:
    return f"This run has no {HEADLINE} of a dual-encoder yet."
  if bm25 is None:
    return f"The dual-encoder reaches {HEADLINE} <b>{dual:.3f}</b>{over}."
  interval = _interval(results, HEADLINE)
  difference = interval[0] if interval else dual - bm25
  side = "above" if difference >= 0 else "below"
  said = f"The dual-encoder reaches {HEADLINE} <b>{dual:.3f}</b>{over}, "
  said += f"{abs(difference):.3f} {side} BM25 at {bm25:.3f}"
  if interval is None:
    return said + "."
  _, low, high = interval
  noise = "; the interval holds 0, so this may be chance" if low <= 0 <= high else ""
  return f"{said} (95&nbsp;% interval of the difference {low:+.3f} to {high:+.3f}{noise})."


def _results(results: dict) -> str:
  rows = {key: _dict(results.get(key)) for key in SYSTEMS}
  columns = _columns(rows.values())
  depth = _dict(results.get("depth"))
  marked = _marked([[three(own.get(measure)) for measure in columns] for own in rows.values()])
  body = [
    draw.row(NAMES[key], cells, f"re-ranks the best {text(depth[key])} of the dual-encoder" if key in depth else "")
    for key, cells in zip(rows, marked)
  ]
  intervals = [_interval(results, measure) for measure in columns]
  if any(intervals):
    cells = [f"{x[0]:+.3f}<small>{x[1]:+.3f} to {x[2]:+.3f}</small>" if x else "–" for x in intervals]
    body.append(draw.row("Dual-encoder minus BM25", cells, "95&nbsp;% interval", "rule"))
  return draw.table(columns, body) + draw.note("The best of each column is bold.")


def _marked(rows: list[list[str]]) -> list[list[str]]:
  """Cells that begin with a number as HTML, the largest of each column bold."""
  best = [max((cell.split()[0] for cell in own if cell != "–"), key=float, default="") for own in zip(*rows)]
  mark = lambda cell, top: f"<td class=best>{cell}</td>" if cell.split()[0] == top else cell
  return [[mark(cell, top) for cell, top in zip(own, best)] for own in rows]


def _stages(results: dict, manifest: dict) -> str:
  rows = {
    (stage, system): _dict(own)
    for stage, systems in _dict(results.get("stages")).items()
    for system, own in _dict(systems).items()
  }
  columns = _columns(rows.values())
  kept = manifest.get("best_stage")
  body = [
    draw.row(
      f"{text(stage)}: {text(NAMES.get(system, system))}",
      [three(own.get(measure)) for measure in columns],
      "kept: the weights behind the results above" if stage == kept else "",
    )
    for (stage, system), own in rows.items()
  ]
  return draw.table(columns, body, "narrow") if body else ""


def _teacher(check: dict) -> str:
  names = {"chance": "Chance", "student": "Student", "late": "Student's late interaction", "teacher": "Teacher"}
  rows = {names[name]: _dict(check.get(name)) for name in names if name in check}
  columns = _columns(rows.values())
  body = [draw.row(name, [three(own.get(m)) for m in columns]) for name, own in rows.items()]
  parts = [draw.table(columns, body, "narrow")] if body else []
  if check.get("depth") is not None:
    parts.append(draw.note(f"On the dev split; the teacher re-ranks the student's best {text(check['depth'])}."))
  if check.get("warning"):
    parts.append(f"<p class=warning><b>Warning.</b> {text(check['warning'])}</p>")
  return "".join(parts)


def _curves(logs: Sequence[Path], names: Sequence[str]) -> str:
  """Small multiples: the total, every term, dev metrics, then gradient norm and learning rate, against the step."""
  found = [_series(path) if path.is_file() else {} for path in logs]
  every = list(dict.fromkeys(name for own in found for name in own))
  last = [name for name in ("gradient norm", "learning rate") if name in every]
  steps = [x for own in found for points in own.values() for x, _ in points]
  charts = [
    draw.chart(name, {label: own.get(name, []) for label, own in zip(names, found)}, (min(steps), max(steps)))
    for name in [name for name in every if name not in last] + last
  ]
  return f"<div class=charts>{''.join(charts)}</div>" if charts else ""


def _series(path: Path) -> dict[str, draw.Points]:
  """Every number of a log against the step, by the name that is shown."""
  series: dict[str, draw.Points] = {"total": []}
  for line_number, line in enumerate(path.read_bytes().splitlines(), 1):
    try:
      record = _dict(json.loads(line))
    except ValueError:
      raise UserError(f"{path}:{line_number}: not a JSON object: remove the line") from None
    step = number(record.get("step"))
    if step is None:
      raise UserError(f"{path}:{line_number}: no number under 'step': remove the line")
    values = {"total": record.get("total"), **_dict(record.get("terms"))}
    values |= {f"dev {name}": value for name, value in _dict(record.get("dev")).items()}
    values |= {key.replace("_", " "): record.get(key) for key in ("gradient_norm", "learning_rate")}
    for name, value in values.items():
      if isinstance(value, int | float):
        series.setdefault(name, []).append((step, float(value)))
  return {name: points for name, points in series.items() if points}


def ranks(runs: dict[str, evaluate.Run], qrels: evaluate.Qrels) -> dict[str, dict[str, int | None]]:
  """Of each judged query the rank, from 1, of its best-ranked positive in each run; None where that holds none."""
  found: dict[str, dict[str, int | None]] = {}
  for query, judged in qrels.items():
    right = {passage for passage, relevance in judged.items() if relevance >= 1}
    own = {name: evaluate.ranked(run.get(query, {})) for name, run in runs.items()}
    first = lambda order: next((rank for rank, passage in enumerate(order, 1) if passage in right), None)
    found[query] = {name: first(order) for name, order in own.items()}
  return found


def disagreements(found: dict[str, dict[str, int | None]], right: str, wrong: str) -> list[str]:
  """The queries whose positive one ranker has first and another lower, the lowest first; both have to hold it."""
  chosen = [(own[wrong], query) for query, own in found.items() if own[right] == 1 and own[wrong] not in (None, 1)]
  return [query for _, query in sorted(chosen, key=lambda pair: (-(pair[0] or 0), pair[1]))]


def _samples(run: Run) -> str:
  """Queries on which the three rankers disagree most: what each finds first, and where it has the positive."""
  directory, fingerprint = run.directory, run.data.get("fingerprint")
  best = run.manifest.get("best_stage")
  files = {"dual": f"test.dual.{best}.trec", "late": f"test.late.{best}.trec", "cross": "test.cross.trec"}
  paths = {name: directory / "runs" / file for name, file in files.items()}
  place = directory / "prepare"
  needed = [*paths.values(), place / "qrels.test.trec", place / "queries.test.tsv", place / "passages" / "order.npy"]
  if not all(path.is_file() for path in needed) or not isinstance(fingerprint, str):
    return ""
  runs = {name: evaluate.read_run(path) for name, path in paths.items()}
  qrels = evaluate.read_qrels(place / "qrels.test.trec")
  queries = evaluate.read_queries(place / "queries.test.tsv")
  passages = collection.open_passages(place, fingerprint)
  found, seen = ranks(runs, qrels), set()
  parts = []
  for right, wrong, count in DISAGREEMENTS:
    every = disagreements(found, right, wrong)
    chosen = [query for query in every if query not in seen][:count]
    seen |= set(chosen)
    head = f"{NAMES[right]} right, {NAMES[wrong].lower()} wrong"
    parts.append(f"<h3 class=kind>{head}: {len(every):,} of {len(qrels):,} queries</h3>")
    parts += [_sample(query, queries.get(query, query), runs, qrels[query], found[query], passages) for query in chosen]
  depth = min((len(own) for own in runs["cross"].values()), default=0)
  remark = "Right is who ranks a known positive first. Of each kind, those are shown where the other ranks it lowest"
  return "".join(parts) + draw.note(f"{remark}. The cross-encoder reads the dual-encoder's best {depth}.")


def _sample(
  query: str,
  asked: str,
  runs: dict[str, evaluate.Run],
  judged: dict[str, int],
  found: dict[str, int | None],
  passages: collection.Passages,
) -> str:
  first = {name: evaluate.ranked(runs[name].get(query, {}))[:1] for name in RANKERS}
  positives = [passage for passage, relevance in judged.items() if relevance >= 1]
  texts = _passages(passages, {positives[0], *(passage for own in first.values() for passage in own)})
  items = [f"<dt><b>Known positive</b></dt><dd>{texts[positives[0]]}</dd>"]
  for name in RANKERS:
    rank = f"positive at rank {found[name]}" if found[name] else f"positive not in its {len(runs[name].get(query, {}))}"
    shown = "the positive" if found[name] == 1 else texts[first[name][0]] if first[name] else "nothing found"
    kind = " class=right" if found[name] == 1 else ""
    items.append(f"<dt{kind}><b>{NAMES[name]}</b>{rank}</dt><dd>{shown}</dd>")
  return f"<div class=sample><p class=asked>{text(asked)}</p><dl class=found>{''.join(items)}</dl></div>"


def _passages(passages: collection.Passages, wanted: Iterable[str]) -> dict[str, str]:
  """Title and beginning of some passages, by their ids, as HTML; of one that is not in the corpus, its id."""
  ascending = np.argsort(passages.order)[::-1]  # `order` counts from the largest id
  found = {}
  for passage in wanted:
    place = bisect.bisect_left(ascending, passage, key=lambda row: passages.ids[int(row)])
    row = int(ascending[place]) if place < len(ascending) else -1
    if row < 0 or passages.ids[row] != passage:
      found[passage] = text(passage)
      continue
    content = " ".join(passages.texts[row].split())
    cut = content if len(content) <= SHOWN else content[:SHOWN] + "…"
    found[passage] = f"<b>{text(passages.titles[row])}</b> {text(cut)}".removeprefix("<b></b> ")
  return found


def _attention(directory: Path) -> str:
  """Heat maps of a few queries with their positives: cross-encoder and late interaction, before and after."""
  path = directory / "evaluate" / "attention.json"
  if not path.is_file():
    return ""
  try:
    about = _json(path)
    parts = [_pair(pair) for pair in about["pairs"]]
    remark = MAPS.format(temperature=float(about["temperature"]))
  except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
    raise UserError(f"{path}: no attention maps as `ernie-jax run` writes them; delete it to leave them out") from error
  return draw.note(remark) + "".join(parts) if parts else ""


def _pair(pair: dict[str, Any]) -> str:
  """One pair's maps, on one scale of colour. Raises whatever reading a wrong structure raises."""
  more = [f"+ {int(pair['more'])} more"] if pair["more"] else []
  names, columns = pair["query_tokens"], [*pair["passage_tokens"], *more]
  same = pair["before"] == pair["after"]  # there was no cascade
  maps = {(when, who): pair[when][who] for when in ("before", "after")[same:] for who in ("cross", "late")}
  for values in maps.values():
    if [len(own) for own in values] != [len(columns)] * len(names):
      raise ValueError(f"a map of {len(values)} rows for {len(names)} tokens")
  # A query of unknown tokens alone has no rows.
  top = max((x for values in maps.values() for own in values for x in own[: len(pair["passage_tokens"])]), default=0.0)
  drawn = [
    draw.heat_map(
      NAMES[who] if same else f"{when.capitalize()}: {NAMES[who].lower()}", values, names, columns, top, bool(more)
    )
    for (when, who), values in maps.items()
  ]
  apart = " to ".join(f"{float(pair[when]['kl']):.3f}" for when in ("before", "after")[same:])
  scale = f"0 <i class=scale></i> {top:.3f} and above; KL {'' if same else 'from '}{apart}"
  return (
    f"<h3>{text(pair['text'])} → {text(pair['passage'])}</h3><p class=note>{scale}</p>"
    f"<div class=maps>{''.join(drawn)}</div>"
  )


def _times(stages: dict) -> str:
  seconds = {stage: number(_dict(record).get("seconds")) or 0.0 for stage, record in stages.items()}
  longest = max(seconds.values(), default=0) or 1
  body = []
  for stage, record in stages.items():
    details = {key: value for key, value in _dict(record).items() if key != "seconds" and number(value) is not None}
    remark = ", ".join(f"{key.replace('_', ' ')} {plain(value)}" for key, value in details.items())
    body.append(draw.bar(stage, remark, seconds[stage] / longest, draw.duration(seconds[stage])))
  body.append(draw.note(f"{draw.duration(sum(seconds.values()))} in all.") if stages else "")
  return "".join(body)


def _facts(manifest: dict) -> str:
  data = _dict(manifest.get("data"))
  queries = ", ".join(f"{plain(count)} {split}" for split, count in _dict(data.get("queries")).items())
  facts = {
    "Passages": plain(data["passages"]) if "passages" in data else "",
    "Queries": queries,
    "Data fingerprint": data.get("fingerprint", ""),
    "Weights came from": manifest.get("start", ""),
    "Seed": manifest.get("seed", ""),
  }
  rows = [f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in facts.items() if value not in ("", None)]
  return f"<dl>{''.join(rows)}</dl>" if rows else ""


def _configuration(settings: dict[str, Any]) -> str:
  """Dotted names, as the command line takes them."""
  if not settings:
    return ""
  lines = "\n".join(f"{name} = {_setting(value)}" for name, value in settings.items())
  return f"<details><summary>{len(settings)} settings</summary><pre>{text(lines)}</pre></details>"


def _bars(rows: Iterable[tuple[str, Any, bool]]) -> str:
  found = [(name, number(_dict(own).get(HEADLINE)), strong) for name, own, strong in rows]
  best = max((value for _, value, _ in found if value is not None), default=0) or 1
  return "".join(
    draw.bar(name, "", value / best, f"{value:.3f}", strong) for name, value, strong in found if value is not None
  )


# Several runs


def _comparison(runs: dict[str, Run]) -> list[str]:
  """Chapters of runs by their names."""
  if not runs:
    return []
  names, found = list(runs), list(runs.values())
  curves = lambda stage: _curves([run.directory / stage / "log.jsonl" for run in found], names)
  key = draw.legend(names) if len(runs) > 1 else ""
  fingerprints = {str(run.data.get("fingerprint")) for run in found}
  warning = "<p class=warning><b>Warning.</b> These runs are of different data: their numbers do not compare.</p>"
  return [
    section("Results", warning * (len(fingerprints) > 1) + _side_by_side(runs)),
    section("Runs", _runs(runs)),
    section("What differs", _differences(runs)) if len(runs) > 1 else "",
    *(section(f"Training: {stage}", key + drawn) for stage in TRAINED if (drawn := curves(stage))),
    section(
      "Each run",
      "".join(
        f"<details class=run><summary>{text(name)}</summary>"
        f"<p>{_summary(run.results, run.manifest)}</p>{''.join(_chapters(run))}</details>"
        for name, run in runs.items()
      ),
    ),
  ]


def groups(runs: dict[str, Run]) -> list[list[str]]:
  """Names of runs, those together that differ in nothing but the seed."""
  found: dict[str, list[str]] = {}
  for name, run in runs.items():
    found.setdefault(run.alike, []).append(name)
  return list(found.values())


def spread(values: Sequence[Any]) -> str:
  """Mean ± standard deviation (of a sample: over n - 1) of those that are numbers; of one, that one."""
  found = [x for value in values if (x := number(value)) is not None]
  if len(found) < 2:
    return three(found[0] if found else None)
  return f"{statistics.fmean(found):.3f} ± {statistics.stdev(found):.3f}"


def _best(runs: dict[str, Run]) -> str:
  """One sentence: which dual-encoder is best, if that can be said."""
  if len({str(run.data.get("fingerprint")) for run in runs.values()}) != 1:
    return ""
  means = []
  for names in groups(runs):
    values = [number(_dict(runs[name].results.get("dual")).get(HEADLINE)) for name in names]
    if known := [value for value in values if value is not None]:
      means.append((statistics.fmean(known), spread(known), ", ".join(names)))
  if not means:
    return ""
  _, value, best = max(means)
  return f"The best dual-encoder reaches {HEADLINE} <b>{value}</b>: {text(best)}."


def _side_by_side(runs: dict[str, Run]) -> str:
  """Every system's measures in every group of runs; one row where all say the same, as of BM25."""
  sets = groups(runs)
  columns = _columns(_dict(run.results.get(key)) for run in runs.values() for key in SYSTEMS)
  body = []
  for key in SYSTEMS:
    measured = [[_dict(runs[name].results.get(key)) for name in names] for names in sets]
    if not any(own for group in measured for own in group):
      continue
    body.append(f"<tr class=rule><th scope=rowgroup colspan={len(columns) + 1}>{NAMES[key]}</th></tr>")
    rows = [[spread([own.get(measure) for own in group]) for measure in columns] for group in measured]
    if len(runs) > 1 and all(own == measured[0][0] for group in measured for own in group):
      body.append(draw.row("all runs", [three(measured[0][0].get(measure)) for measure in columns]))
      continue
    for names, cells in zip(sets, _marked(rows) if len(rows) > 1 else rows):
      seeds = f"<small>{len(names)} seeds</small>" if len(names) > 1 else ""
      body.append(draw.row(f"{text(', '.join(names))}{seeds}", cells))
  remark = "The best of each system is bold."
  if any(len(names) > 1 for names in sets):
    remark += " Runs that differ in nothing but the seed share a row: mean ± standard deviation."
  return draw.table(columns, body) + draw.note(remark)


def _runs(runs: dict[str, Run]) -> str:
  """What each run was: one row each."""
  body = []
  for i, (name, run) in enumerate(runs.items()):
    seconds = [number(_dict(stage).get("seconds")) for stage in _dict(run.manifest.get("stages")).values()]
    total = draw.duration(sum(x for x in seconds if x is not None)) if seconds else "–"
    passages, queries = run.data.get("passages"), _dict(run.data.get("queries")).get("test")
    said = [run.manifest.get("seed"), run.manifest.get("best_stage"), passages, queries, total]
    cells = ["–" if value is None else text(plain(value)) for value in said]
    body.append(draw.row(draw.key(i) * (len(runs) > 1) + text(name), cells))
  return draw.table(["Seed", "Student kept", "Passages", "Test queries", "Time"], body)


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
  """The settings that are not the same in all runs, by dotted names: each run's value as JSON; a dash if it has none.

  A setting that is younger than a run had its default there.
  """
  usual = flat(json.loads(json.dumps(dataclasses.asdict(config.Config()))))
  known = {name for run in runs for name in run.settings}
  filled = [{name: usual[name] for name in known & usual.keys()} | run.settings if run.settings else {} for run in runs]
  names = dict.fromkeys(name for run in runs for name in run.settings)
  alike = lambda name: all(name in own and own[name] == filled[0].get(name) for own in filled)
  return {name: [_setting(own[name]) if name in own else "–" for own in filled] for name in names if not alike(name)}


def _differences(runs: dict[str, Run]) -> str:
  rows = differences(list(runs.values()))
  for label, said in (
    ("data fingerprint", [run.data.get("fingerprint") for run in runs.values()]),
    ("weights came from", [run.manifest.get("start") for run in runs.values()]),
  ):
    if len(set(map(str, said))) > 1:
      rows[label] = ["–" if value is None else str(value) for value in said]
  body = [draw.row(text(name), [text(value) for value in own]) for name, own in rows.items()]
  return draw.table(list(runs), body, "settings") if body else draw.note("Nothing: all have the same configuration.")


def _setting(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False, default=str)


# Ablations


def _ablation(directory: Path, name: str = "") -> list[str]:
  """The table and the plot that `ernie-jax ablate` left."""
  settings = flat(_dict(_dict(_json(directory / "ablation.json")).get("config")))
  content, plot = _markdown(directory / "ablation.md"), directory / "ablation.svg"
  if plot.is_file():  # as an image, whatever it holds runs nothing and loads nothing
    data = base64.b64encode(plot.read_bytes()).decode()
    content += f'<img class=picture alt="The table as a plot" src="data:image/svg+xml;base64,{data}">'
  return [section(f"Ablation{name}", content), section(f"Configuration{name}", _configuration(settings))]


def _markdown(path: Path) -> str:
  """Tables and paragraphs of a Markdown file; `UserError` with `path:line` for a row longer than its head."""
  again = "`ernie-jax ablate` makes the file anew"
  if not path.is_file():
    raise UserError(f"{path}: no such file; {again}")
  lines = [*enumerate(_utf8(path, again).splitlines(), 1)]
  parts = []
  for table, block in itertools.groupby(lines, key=lambda line: line[1].startswith("|") if line[1].strip() else None):
    if not table:
      words = " ".join(line for _, line in block if not line.startswith("#"))
      parts.append(draw.note(text(words.replace("`", ""))) if words.strip() else "")
      continue
    rows = [(at, [cell.strip() for cell in line.strip()[1:].removesuffix("|").split("|")]) for at, line in block]
    (_, head), *rest = rows
    for at, cells in rest:
      if len(cells) != len(head):
        raise UserError(f"{path}:{at}: {len(cells)} cells, not {len(head)}; {again}")
    body = [cells for _, cells in rest if not all(set(cell) <= set("-: ") and cell for cell in cells)]
    drawn = [draw.row(text(own[0]), [text(cell) for cell in own[1:]]) for own in body]
    parts.append(draw.table(head[1:], drawn, "dense"))
  return "".join(parts)


# Reading what may be missing


def _json(path: Path) -> Any:
  try:
    return json.loads(_utf8(path, "`ernie-jax run` makes the file anew"))
  except json.JSONDecodeError as error:
    raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}; `ernie-jax run` makes the file anew") from None


def _utf8(path: Path, remedy: str) -> str:
  try:
    return path.read_bytes().decode()
  except UnicodeDecodeError:
    raise UserError(f"{path}: not UTF-8; {remedy}") from None


def _dict(value: Any) -> dict:
  return value if isinstance(value, dict) else {}


def _columns(rows: Iterable[dict]) -> list[str]:
  """The measures that have a number in some row, the usual ones first."""
  found = [name for own in rows for name, value in own.items() if number(value) is not None]
  return list(dict.fromkeys([name for name in MEASURES if name in found] + found))


def _interval(results: dict, measure: str) -> tuple[float, float, float] | None:
  """(difference, low, high) of dual minus BM25, if the run has it."""
  found = _dict(results.get("dual_minus_bm25")).get(measure)
  values = [number(x) for x in found] if isinstance(found, list) else []
  if len(values) != 3 or None in values:
    return None
  difference, low, high = (float(x) for x in values if x is not None)
  return difference, low, high
