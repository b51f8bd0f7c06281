"""Charts, tables and heat maps as HTML, and the page around them: inline SVG and CSS, no scripts.

Colours are CSS variables, so that everything follows the reader's light or dark mode. Every function escapes the text
that it is given, but for arguments called `content`, `rows` and `cells`: those are HTML.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

Points = list[tuple[float, float]]

COLOURS, DASHES = 6, 4  # of the lines in one chart: together 12 that look different


def page(title: str, content: Sequence[str]) -> str:
  """A whole page; parts that are empty leave nothing."""
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body><main>
{"".join(line + chr(10) for line in content if line)}</main></body>
</html>
"""


def section(title: str, content: str) -> str:
  """A card with a heading; nothing without content."""
  return f"<section><h2>{text(title)}</h2>{content}</section>" if content else ""


def note(content: str) -> str:
  return f"<p class=note>{content}</p>"


def table(columns: Sequence[str], rows: Sequence[str], style: str = "") -> str:
  """Rows under column heads, the first of which is empty; scrolls in its own box where it is too wide."""
  head = "".join(f"<th scope=col>{text(name)}</th>" for name in ["", *columns])
  body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
  return f'<div class=wide><table class="{style}">{body}</table></div>'


def row(name: str, cells: Sequence[str], small: str = "", style: str = "") -> str:
  """A row with its head; a cell that is not HTML of its own (`<td ...>`) is put into one. `name` is HTML."""
  below = f"<small>{small}</small>" if small else ""
  kind = f" class={style}" if style else ""
  put = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)
  return f"<tr{kind}><th scope=row>{name}{below}</th>{put}</tr>"


def bar(name: str, remark: str, share: float, label: str, strong: bool = True) -> str:
  """One labelled horizontal bar; `share` of the full width, 0 to 1."""
  small = f"<small>{text(remark)}</small>" if remark else ""
  style = f"width:{100 * min(max(share, 0), 1):.2f}%"
  return (
    f"<div class=bar><span>{text(name)}{small}</span>"
    f'<div><i class={"strong" if strong else "weak"} style="{style}"></i></div><b>{text(label)}</b></div>'
  )


def look(i: int) -> str:
  """The CSS classes of line i: its colour and its dashes."""
  return f"c{i % COLOURS} d{i % DASHES}"


def key(i: int) -> str:
  """A short piece of line i, as it stands beside its name."""
  return f'<svg class=key viewBox="0 0 26 10" aria-hidden="true"><polyline class="{look(i)}" points="1,5 25,5"/></svg>'


def legend(names: Sequence[str]) -> str:
  return f"<p class=legend>{''.join(f'<span>{key(i)}{text(name)}</span>' for i, name in enumerate(names))}</p>"


def chart(name: str, lines: dict[str, Points], span: tuple[float, float]) -> str:
  """A line chart over the steps of `span`: running means, the last one as a number.

  One line alone is drawn with its single values behind it; several have a colour each, by their place (`legend`).
  """
  width, height, left, right, top, bottom = 300, 150, 44, 8, 8, 20
  several = len(lines) > 1
  finite = {label: [(x, y) for x, y in points if math.isfinite(y)] for label, points in lines.items()}
  lost = sum(map(len, lines.values())) - sum(map(len, finite.values()))
  remark = f"{lost} values not finite" if lost else ""
  if not any(finite.values()):
    return f"<figure><figcaption>{text(name)}<b>{remark}</b></figcaption></figure>"
  drawn = {label: thinned(points) for label, points in finite.items()}
  # The schedule has no noise to smooth away.
  reach = {label: 0 if name == "learning rate" else len(points) // 30 for label, points in drawn.items()}
  smooth = {label: averaged(points, reach[label]) for label, points in drawn.items()}

  heights = [y for points in (smooth if several else drawn).values() for _, y in points]
  marks_at = ticks(min(heights), max(heights))
  low, high = marks_at[0], marks_at[-1]
  first, end = span if span[1] > span[0] else (span[0] - 0.5, span[0] + 0.5)
  across = lambda x: left + (x - first) / (end - first) * (width - left - right)
  down = lambda y: top + (high - y) / (high - low) * (height - top - bottom)
  line = lambda path: " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in path)
  grid = "".join(
    f'<line class=grid x1="{left}" x2="{width - right}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>'
    f'<text x="{left - 6}" y="{down(y) + 3.5:.1f}" text-anchor="end">{short(y)}</text>'
    for y in marks_at
  )
  steps = (
    f'<text x="{left}" y="{height - 5}">{plain(span[0])}</text>'
    f'<text x="{width - right}" y="{height - 5}" text-anchor="end">step {plain(span[1])}</text>'
  )
  said = {label: f"from {short(path[0][1])} to {short(path[-1][1])}" for label, path in smooth.items() if path}
  if several:
    marks = "".join(
      f'<polyline class="smooth {look(i)}" points="{line(path)}"><title>{text(label)} {said[label]}</title></polyline>'
      for i, (label, path) in enumerate(smooth.items())
      if path
    )
    title = f"{name}: " + "; ".join(f"{label} {words}" for label, words in said.items())
    last = remark
  else:
    ((label, path),) = smooth.items()
    marks = f'<polyline class=raw points="{line(drawn[label])}"/>' if reach[label] else ""
    x, y = path[-1]
    marks += f'<polyline class=smooth points="{line(path)}"/>'
    marks += f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3"/>'
    title, last = f"{name} {said[label]}", remark or short(y)
  return (
    f"<figure><figcaption>{text(name)}<b>{last}</b></figcaption>"
    f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(title)}">{grid}{steps}{marks}</svg></figure>'
  )


def thinned(points: Points) -> Points:
  """At most 300 points, each the mean of its neighbours."""
  size = max(1, -(-len(points) // 300))
  groups = [points[i : i + size] for i in range(0, len(points), size)]
  return [(math.fsum(x for x, _ in own) / len(own), math.fsum(y for _, y in own) / len(own)) for own in groups]


def averaged(points: Points, reach: int) -> Points:
  """Each value's mean with as many neighbours on either side."""
  windows = [points[max(0, i - reach) : i + reach + 1] for i in range(len(points))]
  return [(x, math.fsum(y for _, y in window) / len(window)) for (x, _), window in zip(points, windows)]


def ticks(low: float, high: float) -> list[float]:
  """Round numbers at equal steps, three or so, that enclose low and high."""
  spread = high - low
  if spread <= 1e-9 * max(abs(low), abs(high)):  # a constant
    spread = abs(high) or 1.0
  unit = 10.0 ** math.floor(math.log10(spread / 2))
  step = next(unit * factor for factor in (1, 2, 5, 10) if spread / (unit * factor) <= 2.5)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [i * step for i in range(first, max(last, first + 1) + 1)]


def heat_map(
  title: str,
  values: Sequence[Sequence[float]],
  names: Sequence[str],
  columns: Sequence[str],
  top: float,
  rest: bool = False,
) -> str:
  """A table whose cells are the darker, the larger their value; `top` is the darkest. Numbers show on pointing at them.

  Of small values differences show more than of large ones: what is painted is the square root of value / top. With
  `rest` the last column stands apart.
  """
  kind = lambda j: " class=rest" if rest and j == len(columns) - 1 else ""
  heads = "".join(f"<th scope=col{kind(j)}><span>{text(name)}</span></th>" for j, name in enumerate(columns))
  cell = lambda j, x: f'<td{kind(j)} style="--a:{_share(x, top)}%" title="{x:.3f}"></td>'
  lines = "".join(
    f"<tr><th scope=row>{text(name)}</th>{''.join(cell(j, x) for j, x in enumerate(own))}</tr>"
    for name, own in zip(names, values)
  )
  body = f"<caption>{text(title)}</caption><thead><tr><td></td>{heads}</tr></thead><tbody>{lines}</tbody>"
  return f'<div class=wide tabindex=0 role=region aria-label="{text(title)}"><table class=map>{body}</table></div>'


def _share(x: float, top: float) -> int:
  return round(100 * math.sqrt(min(max(x / top, 0), 1))) if top > 0 else 0


# Numbers and text


def text(value: Any) -> str:
  return html.escape(str(value))


def number(value: Any) -> float | None:
  """The number, or None for anything that is not a finite number."""
  real = isinstance(value, int | float) and not isinstance(value, bool)
  return float(value) if real and math.isfinite(value) else None


def three(value: Any) -> str:
  """Three decimals, or a dash for what is no number."""
  found = number(value)
  return "–" if found is None else f"{found:.3f}"


def plain(value: Any) -> str:
  """12345 -> 12,345; 0.25 -> 0.25; other things as they are."""
  found = number(value)
  if found is None:
    return str(value)
  return f"{found:,.0f}" if found.is_integer() else short(found)


def short(value: float) -> str:
  """Three digits, without needless zeros: 0.05, 1.2, 2e-05."""
  return f"{0.0 if abs(value) < 1e-12 else value:.3g}"


def duration(seconds: float) -> str:
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes = round(seconds / 60)
  return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #1d1f23; --soft: #62676f;
  --line: #e3e3de;
  --strong: #1f62c4; --weak: #aebccf; --alert: #8a4b00; --alert-page: #fff4e0;
  --c0: #1f62c4; --c1: #c2410c; --c2: #0f766e; --c3: #7c3aed; --c4: #8a6100; --c5: #be185d; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1b1e23; --ink: #e7e8ea;
  --soft: #9ba1aa;
  --line: #2e3238; --strong: #71a8f5; --weak: #4a5566; --alert: #f3c27a; --alert-page: #33270f;
  --c0: #71a8f5; --c1: #fb923c; --c2: #2dd4bf; --c3: #b79cf7; --c4: #e3c04a; --c5: #f472b6; } }
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
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
.d1 { stroke-dasharray: 7 4; } .d2 { stroke-dasharray: 2 4; } .d3 { stroke-dasharray: 8 4 2 4; }
.key { display: inline-block; width: 1.6rem; margin-right: .45rem; vertical-align: middle; stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: 0 0 .9rem; font-size: .88rem; }
.legend span { overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 1.4rem 0 .5rem; }
h3.kind { color: var(--soft); font-weight: 500; margin-top: 1.8rem; }
h2 + h3, h2 + h3.kind { margin-top: 0; }
.sample { padding: .8rem 0 .2rem; border-top: 1px solid var(--line); }
.sample > p { margin: 0 0 .5rem; overflow-wrap: anywhere; }
.asked { font-weight: 600; }
.found { display: grid; grid-template-columns: minmax(9rem, 22%) 1fr; gap: .1rem 1rem; margin: .5rem 0;
  font-size: .9rem; }
.found dt b { display: block; color: var(--ink); font-weight: 500; }
.found dd { margin-bottom: .5rem; }
.found .right b { color: var(--strong); }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: .6rem 1.2rem; margin: .4rem 0 1.4rem; }
.map { width: auto; border-collapse: separate; border-spacing: 1px; font-size: .72rem; }
.map caption { text-align: left; font-size: .85rem; padding-bottom: .3rem; white-space: nowrap;
  position: sticky; left: 0; width: max-content; }
.map th, .map td, .map th:first-child { min-width: 0; padding: 0; border: 0; font-weight: 400; line-height: 1.1; }
.map tbody td { width: .82rem; min-width: .82rem; height: .95rem;
  background: color-mix(in srgb, var(--strong) var(--a), var(--page)); }
.map .rest { border-left: .3rem solid var(--card); background-clip: padding-box; }
.map thead th { vertical-align: bottom; text-align: center; font-size: inherit; color: inherit; }
.map thead span { display: inline-block; writing-mode: vertical-rl; max-height: 7rem; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.map th[scope=row] { padding-right: .4rem; white-space: nowrap; position: sticky; left: 0;
  background: var(--card); text-align: right; }
.scale { display: inline-block; width: 6rem; height: .7rem; margin: 0 .4rem; vertical-align: baseline;
  background: linear-gradient(90deg, var(--page), var(--strong)); border: 1px solid var(--line); }
details > section { padding-inline: 0; border-width: 1px 0 0; border-radius: 0; background: none; }
.run > summary { color: var(--ink); font-weight: 500; padding: .3rem 0; }
td { white-space: nowrap; }
th[scope=rowgroup] { font-weight: 600; padding-top: .8rem; }
.settings th, .settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.settings th:first-child { min-width: 11rem; }
.dense { font-size: .82rem; }
.dense th, .dense td { min-width: 0; padding-inline: .35rem; }
.dense th:first-child { padding-left: 0; min-width: 8rem; }
.picture { display: block; max-width: 100%; height: auto; margin: 1rem 0 0; background: #fff; border-radius: .3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.4rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); }
pre { overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  margin: .8rem 0 0; }
@media (max-width: 34rem) { main { padding: 1.5rem .7rem 3rem; } section { padding: 1rem .9rem; }
  th, td { min-width: 4.2rem; padding-inline: .4rem; } th:first-child { min-width: 7.5rem; }
  .found { grid-template-columns: 1fr; } .bar { grid-template-columns: 7rem 1fr 4.2rem; gap: .6rem; } }
@media print { section { break-inside: avoid; } }
"""
