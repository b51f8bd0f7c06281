"""One page that shows what a run did: results, curves, times, configuration.

Reads the files that a run leaves and writes `report.html`: one file without scripts, whose charts are inline
SVG and CSS, so they follow the reader's light or dark mode.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ernie_jax import config
from ernie_jax.config import UserError
from ernie_jax.evaluate import MEASURES, SYSTEMS

NAMES = {
  "bm25": "BM25",
  "zero_shot": "Zero-shot dual-encoder",
  "dual": "Dual-encoder",
  "late": "Late interaction",
  "cross": "Cross-encoder",
}
TRAINED = ("post", "interaction", "warmup", "cascade")  # the stages that leave a log.jsonl
HEADLINE = "MRR@10"


def write_report(directory: str | Path) -> Path:
  """Writes `directory/report.html` from `metrics.json`, `manifest.json`, `<stage>/log.jsonl`.

  Only `metrics.json` has to be there. Raises `UserError` when it is missing, and with `path:line` for a file
  that is not JSON.
  """
  directory = Path(directory)
  if not (directory / "metrics.json").is_file():
    raise UserError(f"{directory / 'metrics.json'}: no such file: `ernie-jax run` makes it; give that run's directory")
  results = _dict(_json(directory / "metrics.json"))
  manifest = _dict(_json(directory / "manifest.json")) if (directory / "manifest.json").is_file() else {}
  body = [
    "<header><h1>Retrieval run</h1>",
    f"<p class=lead>{_summary(results, manifest)}</p></header>",
    _section("Results", _results(results)),
    _section(HEADLINE, _bars((NAMES[key], results.get(key), key == "dual") for key in SYSTEMS)),
    _section("Student after each stage", _stages(results, manifest)),
    _section("Is the teacher better than its student?", _teacher(_dict(manifest.get("teacher_check")))),
    *(_section(f"Training: {stage}", _curves(directory / stage / "log.jsonl")) for stage in TRAINED),
    _section("Time", _times(_dict(manifest.get("stages")))),
    _section("Data and start", _facts(manifest)),
    _section("Configuration", _configuration(manifest.get("config"))),
  ]
  page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Retrieval run {_text(directory.resolve().name)}</title>
<style>{STYLE}</style>
</head>
<body><main>
{"".join(line + chr(10) for line in body if line)}</main></body>
</html>
"""
  config.write(directory / "report.html", page)
  return directory / "report.html"


# Chapters: each gives HTML, or nothing when the run left nothing to show


def _summary(results: dict, manifest: dict) -> str:
  """One sentence: the dual-encoder against BM25."""
  dual, bm25 = (_value(_dict(results.get(key)).get(HEADLINE)) for key in ("dual", "bm25"))
  data = _dict(manifest.get("data"))
  queries, passages = _value(_dict(data.get("queries")).get("test")), _value(data.get("passages"))
  over = f" on {queries:,.0f} test queries" if queries is not None else ""
  over += f" over {passages:,.0f} passages" if passages is not None else ""
  if dual is None:
    return f"This run has no {HEADLINE} of a dual-encoder yet."
  if bm25 is None:
    return f"The dual-encoder reaches {HEADLINE} <b>{dual:.3f}</b>{over}."
  interval = _interval(results, HEADLINE)
  difference = interval[0] if interval else dual - bm25
  side = "above" if difference >= 0 else "below"
  text = f"The dual-encoder reaches {HEADLINE} <b>{dual:.3f}</b>{over}, "
  text += f"{abs(difference):.3f} {side} BM25 at {bm25:.3f}"
  if interval is None:
    return text + "."
  _, low, high = interval
  noise = "; the interval holds 0, so this may be chance" if low <= 0 <= high else ""
  return f"{text} (95&nbsp;% interval of the difference {low:+.3f} to {high:+.3f}{noise})."


def _results(results: dict) -> str:
  rows = {key: _dict(results.get(key)) for key in SYSTEMS}
  columns = _columns(rows.values())
  best = {
    measure: _three(max(value for row in rows.values() if (value := _value(row.get(measure))) is not None))
    for measure in columns
  }
  depth = _dict(results.get("depth"))
  body = []
  for key, row in rows.items():
    note = f"<small>re-ranks the best {_text(depth[key])} of the dual-encoder</small>" if key in depth else ""
    cells = [
      f"<td class=best>{best[measure]}</td>"
      if _three(row.get(measure)) == best[measure]
      else f"<td>{_three(row.get(measure))}</td>"
      for measure in columns
    ]
    body.append(f"<tr><th scope=row>{NAMES[key]}{note}</th>{''.join(cells)}</tr>")
  intervals = [_interval(results, measure) for measure in columns]
  if any(intervals):
    cells = [f"<td>{x[0]:+.3f}<small>{x[1]:+.3f} to {x[2]:+.3f}</small></td>" if x else "<td>–</td>" for x in intervals]
    head = "<th scope=row>Dual-encoder minus BM25<small>95&nbsp;% interval</small></th>"
    body.append(f"<tr class=rule>{head}{''.join(cells)}</tr>")
  return _table(columns, body) + "<p class=note>The best of each column is bold.</p>"


def _stages(results: dict, manifest: dict) -> str:
  rows = {
    (stage, system): _dict(row)
    for stage, systems in _dict(results.get("stages")).items()
    for system, row in _dict(systems).items()
  }
  columns = _columns(rows.values())
  kept = manifest.get("best_stage")
  body = []
  for (stage, system), row in rows.items():
    note = "<small>kept: the weights behind the results above</small>" if stage == kept else ""
    cells = "".join(f"<td>{_three(row.get(measure))}</td>" for measure in columns)
    body.append(f"<tr><th scope=row>{_text(stage)}: {_text(NAMES.get(system, system))}{note}</th>{cells}</tr>")
  return _table(columns, body, "narrow") if body else ""


def _teacher(check: dict) -> str:
  rows = {name: _dict(check.get(name)) for name in ("student", "teacher") if name in check}
  columns = _columns(rows.values())
  body = [
    f"<tr><th scope=row>{name.capitalize()}</th>"
    + "".join(f"<td>{_three(row.get(measure))}</td>" for measure in columns)
    + "</tr>"
    for name, row in rows.items()
  ]
  parts = [_table(columns, body, "narrow")] if body else []
  if check.get("depth") is not None:
    parts.append(
      f"<p class=note>On the dev split; the teacher re-ranks the student's best {_text(check['depth'])}.</p>"
    )
  if check.get("warning"):
    parts.append(f"<p class=warning><b>Warning.</b> {_text(check['warning'])}</p>")
  return "".join(parts)


def _curves(path: Path) -> str:
  """Small multiples: the total, every term, dev metrics, then gradient norm and learning rate, against the step."""
  if not path.is_file():
    return ""
  series: dict[str, list[tuple[float, float]]] = {"total": []}
  steps = []
  for number, line in enumerate(path.read_bytes().splitlines(), 1):
    try:
      record = _dict(json.loads(line))
    except ValueError:
      raise UserError(f"{path}:{number}: not a JSON object: remove the line") from None
    step = _value(record.get("step"))
    if step is None:
      raise UserError(f"{path}:{number}: no number under 'step': remove the line")
    steps.append(step)
    values = {"total": record.get("total"), **_dict(record.get("terms"))}
    values |= {f"dev {name}": value for name, value in _dict(record.get("dev")).items()}
    values |= {key.replace("_", " "): record.get(key) for key in ("gradient_norm", "learning_rate")}
    for name, value in values.items():
      if isinstance(value, int | float):
        series.setdefault(name, []).append((step, float(value)))
  last = [name for name in ("gradient norm", "learning rate") if name in series]
  order = [name for name in series if name not in last] + last
  charts = [_chart(name, series[name], (steps[0], steps[-1])) for name in order if series[name]]
  return f"<div class=charts>{''.join(charts)}</div>" if charts else ""


def _times(stages: dict) -> str:
  seconds = {stage: _value(_dict(record).get("seconds")) or 0.0 for stage, record in stages.items()}
  longest = max(seconds.values(), default=0) or 1
  body = []
  for stage, record in stages.items():
    details = {key: value for key, value in _dict(record).items() if key != "seconds" and _value(value) is not None}
    note = ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in details.items())
    body.append(_bar(stage, note, seconds[stage] / longest, _duration(seconds[stage])))
  body.append(f"<p class=note>{_duration(sum(seconds.values()))} in all.</p>" if stages else "")
  return "".join(body)


def _facts(manifest: dict) -> str:
  data = _dict(manifest.get("data"))
  queries = ", ".join(f"{_plain(count)} {split}" for split, count in _dict(data.get("queries")).items())
  facts = {
    "Passages": _plain(data["passages"]) if "passages" in data else "",
    "Queries": queries,
    "Data fingerprint": data.get("fingerprint", ""),
    "Weights came from": manifest.get("start", ""),
    "Seed": manifest.get("seed", ""),
  }
  rows = [f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in facts.items() if value not in ("", None)]
  return f"<dl>{''.join(rows)}</dl>" if rows else ""


def _configuration(config: Any) -> str:
  """Dotted names, as the command line takes them."""

  def lines(node: Any, name: str) -> Iterable[str]:
    if isinstance(node, dict) and node:
      for key, child in node.items():
        yield from lines(child, f"{name}.{key}" if name else str(key))
    else:
      yield f"{name} = {json.dumps(node, ensure_ascii=False, default=str)}"

  if not config:
    return ""
  text = "\n".join(lines(config, ""))
  return f"<details><summary>{text.count(chr(10)) + 1} settings</summary><pre>{_text(text)}</pre></details>"


# Drawing


def _bars(rows: Iterable[tuple[str, Any, bool]]) -> str:
  found = [(name, _value(_dict(row).get(HEADLINE)), strong) for name, row, strong in rows]
  best = max((value for _, value, _ in found if value is not None), default=0) or 1
  return "".join(
    _bar(name, "", value / best, f"{value:.3f}", strong) for name, value, strong in found if value is not None
  )


def _bar(name: str, note: str, share: float, label: str, strong: bool = True) -> str:
  """One labelled horizontal bar; `share` of the full width, 0 to 1."""
  small = f"<small>{_text(note)}</small>" if note else ""
  style = f"width:{100 * min(max(share, 0), 1):.2f}%"
  return (
    f"<div class=bar><span>{_text(name)}{small}</span>"
    f'<div><i class={"strong" if strong else "weak"} style="{style}"></i></div><b>{_text(label)}</b></div>'
  )


def _chart(name: str, points: list[tuple[float, float]], span: tuple[float, float]) -> str:
  """A line chart: every value thin, their running mean thick, the last mean as a number."""
  width, height, left, right, top, bottom = 300, 150, 44, 8, 8, 20
  finite = [(x, y) for x, y in points if math.isfinite(y)]
  lost = len(points) - len(finite)
  note = f"{lost} values not finite" if lost else ""
  if not finite:
    return f"<figure><figcaption>{_text(name)}<b>{note}</b></figcaption></figure>"
  size = -(-len(finite) // 300)  # at most 300 points are drawn; each is the mean of its neighbours
  groups = [finite[i : i + size] for i in range(0, len(finite), size)]
  drawn = [tuple(math.fsum(column) / len(column) for column in zip(*group)) for group in groups]
  reach = 0 if name == "learning rate" else len(drawn) // 30  # the schedule has no noise to smooth away
  windows = [drawn[max(0, i - reach) : i + reach + 1] for i in range(len(drawn))]
  smooth = [(x, math.fsum(y for _, y in window) / len(window)) for (x, _), window in zip(drawn, windows)]

  ticks = _ticks(min(y for _, y in drawn), max(y for _, y in drawn))
  low, high = ticks[0], ticks[-1]
  first, end = span if span[1] > span[0] else (span[0] - 0.5, span[0] + 0.5)
  across = lambda x: left + (x - first) / (end - first) * (width - left - right)
  down = lambda y: top + (high - y) / (high - low) * (height - top - bottom)
  line = lambda path: " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in path)
  grid = "".join(
    f'<line class=grid x1="{left}" x2="{width - right}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>'
    f'<text x="{left - 6}" y="{down(y) + 3.5:.1f}" text-anchor="end">{_short(y)}</text>'
    for y in ticks
  )
  steps = (
    f'<text x="{left}" y="{height - 5}">{_plain(span[0])}</text>'
    f'<text x="{width - right}" y="{height - 5}" text-anchor="end">step {_plain(span[1])}</text>'
  )
  marks = f'<polyline class=raw points="{line(drawn)}"/>' if reach else ""
  marks += f'<polyline class=smooth points="{line(smooth)}"/>'
  x, y = smooth[-1]
  marks += f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3"/>'
  title = f"{_text(name)} from {_short(smooth[0][1])} to {_short(y)}"
  return (
    f"<figure><figcaption>{_text(name)}<b>{note or _short(y)}</b></figcaption>"
    f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{grid}{steps}{marks}</svg></figure>'
  )


def _ticks(low: float, high: float) -> list[float]:
  """Round numbers at equal steps, three or so, that enclose low and high."""
  spread = high - low
  if spread <= 1e-9 * max(abs(low), abs(high)):  # a constant
    spread = abs(high) or 1.0
  unit = 10.0 ** math.floor(math.log10(spread / 2))
  step = next(unit * factor for factor in (1, 2, 5, 10) if spread / (unit * factor) <= 2.5)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [i * step for i in range(first, max(last, first + 1) + 1)]


def _columns(rows: Iterable[dict]) -> list[str]:
  """The measures that have a number in some row, the usual ones first."""
  found = [name for row in rows for name, value in row.items() if _value(value) is not None]
  return list(dict.fromkeys([name for name in MEASURES if name in found] + found))


def _table(columns: list[str], rows: list[str], style: str = "") -> str:
  head = "".join(f"<th scope=col>{_text(name)}</th>" for name in ["", *columns])
  body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
  return f'<div class=wide><table class="{style}">{body}</table></div>'


def _section(title: str, content: str) -> str:
  return f"<section><h2>{_text(title)}</h2>{content}</section>" if content else ""


# Reading what may be missing


def _json(path: Path) -> Any:
  try:
    return json.loads(path.read_bytes())
  except json.JSONDecodeError as error:
    raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}; `ernie-jax run` makes the file anew") from None
  except UnicodeDecodeError:
    raise UserError(f"{path}: not UTF-8; `ernie-jax run` makes the file anew") from None


def _dict(value: Any) -> dict:
  return value if isinstance(value, dict) else {}


def _value(value: Any) -> float | None:
  """The number, or None for anything that is not a finite number."""
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return float(value) if number and math.isfinite(value) else None


def _interval(results: dict, measure: str) -> tuple[float, float, float] | None:
  """(difference, low, high) of dual minus BM25, if the run has it."""
  found = _dict(results.get("dual_minus_bm25")).get(measure)
  values = [_value(x) for x in found] if isinstance(found, list) else []
  if len(values) != 3 or None in values:
    return None
  difference, low, high = (float(x) for x in values if x is not None)
  return difference, low, high


# Writing numbers and text


def _text(value: Any) -> str:
  return html.escape(str(value))


def _three(value: Any) -> str:
  number = _value(value)
  return "–" if number is None else f"{number:.3f}"


def _plain(value: Any) -> str:
  """12345 -> 12,345; 0.25 -> 0.25; other things as they are."""
  number = _value(value)
  if number is None:
    return str(value)
  return f"{number:,.0f}" if number.is_integer() else _short(number)


def _short(number: float) -> str:
  """Three digits, without needless zeros: 0.05, 1.2, 2e-05."""
  return f"{0.0 if abs(number) < 1e-12 else number:.3g}"


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes = round(seconds / 60)
  return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #1d1f23; --soft: #62676f;
  --line: #e3e3de;
  --strong: #1f62c4; --weak: #aebccf; --alert: #8a4b00; --alert-page: #fff4e0; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1b1e23; --ink: #e7e8ea;
  --soft: #9ba1aa;
  --line: #2e3238; --strong: #71a8f5; --weak: #4a5566; --alert: #f3c27a; --alert-page: #33270f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.1rem; margin: 0 0 .9rem; }
.lead { font-size: 1.15rem; margin: 0; max-width: 44rem; }
section { margin-top: 1.5rem; padding: 1.2rem 1.4rem 1.3rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; }
small { display: block; color: var(--soft); font-size: .8rem; font-weight: 400; line-height: 1.35; }
.note { color: var(--soft); font-size: .85rem; margin: .7rem 0 0; }
.warning { margin: .9rem 0 0; padding: .7rem .9rem; border-radius: .4rem; color: var(--alert);
  background: var(--alert-page); border-left: .25rem solid currentColor; }
.wide { overflow-x: auto; }
th, td { min-width: 6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .8rem; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th:first-child { text-align: left; padding-left: 0; font-weight: 500; }
tr > :last-child { padding-right: 0; }
thead th { color: var(--soft); font-size: .85rem; font-weight: 500; }
tbody tr:last-child > * { border-bottom: 0; }
table.narrow { width: auto; min-width: 60%; }
.rule > * { border-top: 2px solid var(--line); }
.best { font-weight: 700; color: var(--strong); }
.bar { display: grid; grid-template-columns: minmax(7rem, 28%) 1fr 5rem; gap: .9rem;
  align-items: center;
  margin: .45rem 0; }
.bar i { display: block; height: 1.05rem; min-width: 2px; border-radius: 0 .2rem .2rem 0; }
.bar b { font-weight: 500; font-variant-numeric: tabular-nums; }
.strong { background: var(--strong); } .weak { background: var(--weak); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.2rem 1.4rem; }
figure { margin: 0; }
figcaption { display: flex; justify-content: space-between; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
figcaption b { font-weight: 600; color: var(--strong); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 10.5px; font-variant-numeric: tabular-nums; }
svg circle { fill: var(--strong); }
.grid { stroke: var(--line); }
polyline { fill: none; stroke: var(--strong); stroke-linejoin: round; stroke-linecap: round; }
.raw { stroke-width: 1; opacity: .3; } .smooth { stroke-width: 2; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.4rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); }
pre { overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  margin: .8rem 0 0; }
@media print { section { break-inside: avoid; } }
"""
