"""What each part of the method contributes: the same configuration without it, at equal steps from the same start.

The rows are those of the paper's two ablation tables (METHOD: ablations) and two controls, which it lacks:

  loss      full; without L_KL(CE->LI), L_KL(LI->DE), L_KL(CE->DE), the token-level L_attention, pairs of them, all of
            them; without each contrastive loss
  controls  the dual-encoder alone on the same negatives; no teacher (LI -> DE); a uniform teacher; no cascade at all
  strategy  without post-training, interaction distillation (ID') in finetuning 1 or 2, DualReg, cross-batch
            negatives, denoising

  DIR/shared/<start>/<stage>-<digest>   stages before the cascade, once for all rows whose configurations agree there
  DIR/<row>/<seed>                      a run of that row: links to those stages, its cascade, runs/, evaluate/
  DIR/ablation.json .md .csv .svg       the table

A row's seed is that of its cascade: what comes before has the configuration's own seed, so all start alike. Several
processes may be given the same command: each takes the rows that no other has, and the last one's table has all.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from ernie_jax import collection, columns, config, evaluate, mesh, recipe
from ernie_jax.config import Config, Train, UserError, Weights
from ernie_jax.progress import clock, say
from ernie_jax.scores import Params

Group = Literal["loss", "controls", "strategy", "own"]
GROUPS: tuple[Group, ...] = ("loss", "controls", "strategy", "own")
USUAL = ("loss", "controls")  # rows without `--rows`
SYSTEMS = {"dual": "DE", "late": "LI"}
SHOWN = ("MRR@10", "R@20")  # in the table, and compared to full's; JSON and CSV have all of `evaluate.MEASURES`
PLOTTED = "MRR@10"
FILE = "ablation.config.json"  # not config.json: the folder holds runs and is none
LOCK = ".lock"  # a file in a folder that one process at a time may change; 0.lock beside the folder of seed 0


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table."""

  name: str  # of its folder, and for --rows
  group: Group
  label: str
  config: Config

  def changes(self, full: Config) -> dict[str, list[Any]]:
    """{field: [value in full, value here]} of the fields that differ."""
    old, new = (config.flat(dataclasses.asdict(c)) for c in (full, self.config))
    return {k: [old.get(k), new.get(k)] for k in sorted(old | new) if old.get(k) != new.get(k)}


# ---- The rows, as data ---------------------------------------------------------------------------------------------

CROSS = ("kl_ce_li", "kl_ce_de", "kl_attention")  # what the cross-encoder teaches
DISTILLED = (*CROSS, "kl_li_de")
DUALREG = ("dualreg_query", "dualreg_passage")
PARAMETERS = (*config.TEACHING, "margin_mse", "virt")  # need the CE's own
DEVICES = 8  # of the global batch, of which one has its negatives in "no_cross_batch"

Change = Callable[[Config], Config]


def stage(c: Config, name: str, **fields: Any) -> Config:
  """The configuration with other fields of a stage."""
  return dataclasses.replace(c, **{name: dataclasses.replace(getattr(c, name), **fields)})


def weighted(train: Train, keep: Callable[[str], bool]) -> dict[str, Weights | None]:
  """Both weights of a stage with those terms at 0 that are not kept."""
  off = {f.name: 0.0 for f in dataclasses.fields(Weights) if not keep(f.name)}
  final = train.final_weights
  return {
    "weights": dataclasses.replace(train.weights, **off),
    "final_weights": None if final is None else dataclasses.replace(final, **off),
  }


def without(*terms: str, **fields: Any) -> Change:
  """The cascade without these terms."""
  return lambda c: stage(c, "cascade", **weighted(c.cascade, lambda term: term not in terms), **fields)


def only(*terms: str) -> Change:
  """The cascade with these terms alone, at their weights."""
  return lambda c: stage(c, "cascade", **weighted(c.cascade, lambda term: term in terms))


def frozen(c: Config) -> Config:
  teacher = "frozen" if c.cascade.teacher == "joint" else c.cascade.teacher
  return without("nll_ce", teacher=teacher)(c)


def without_dualreg(c: Config) -> Config:
  for name in recipe.TRAINED:
    train = getattr(c, name)
    if train.on.needs_twin:
      c = stage(c, name, **weighted(train, lambda term: term not in DUALREG))
  return c


def without_cross_batch(c: Config) -> Config:
  """Negatives from the batch of one device in eight; without hard ones a query needs one other query's, at least."""
  for name in ("post", "interaction", "cascade"):
    train = getattr(c, name)
    if not train.steps or not train.on.needs_student:
      continue
    least = max(train.batch // DEVICES, 1 if train.negatives else 2)
    group = next((n for n in range(least, train.batch) if train.batch % n == 0), None)
    c = stage(c, name, in_batch=group if train.in_batch is None else train.in_batch)
  return c


def without_post(c: Config) -> Config:
  return stage(c, "post", steps=0)


ROWS: tuple[tuple[str, Group, str, Change], ...] = (
  ("full", "loss", "full", lambda c: c),
  ("no_kl_ce_li", "loss", "without CE→LI", without("kl_ce_li")),
  ("no_kl_li_de", "loss", "without LI→DE", without("kl_li_de")),
  ("no_kl_ce_de", "loss", "without CE→DE", without("kl_ce_de")),
  ("no_kl_attention", "loss", "without attention", without("kl_attention")),
  ("no_kl_ce_li_li_de", "loss", "without CE→LI, LI→DE", without("kl_ce_li", "kl_li_de")),
  ("no_kl_ce_li_ce_de", "loss", "without CE→LI, CE→DE", without("kl_ce_li", "kl_ce_de")),
  ("no_kl_li_de_ce_de", "loss", "without LI→DE, CE→DE", without("kl_li_de", "kl_ce_de")),
  ("no_kl_ce_li_attention", "loss", "without CE→LI, attention", without("kl_ce_li", "kl_attention")),
  ("no_kl_ce", "loss", "without all of the CE's", without(*CROSS)),
  ("no_kl", "loss", "without all distillation", without(*DISTILLED)),
  ("no_nll_de", "loss", "without DE's own loss", without("nll_de")),
  ("no_nll_li", "loss", "without LI's own loss", without("nll_li")),
  ("no_nll_ce", "loss", "without CE's own loss (frozen)", frozen),
  ("de_only", "controls", "DE only", only("nll_de", *DUALREG)),
  ("no_teacher", "controls", "no teacher (LI→DE)", only("nll_de", "nll_li", "kl_li_de", *DUALREG)),
  ("uniform_teacher", "controls", "uniform teacher", without(*PARAMETERS, teacher="uniform")),
  ("stage_1", "controls", "no cascade (the start)", lambda c: stage(c, "cascade", steps=0)),
  ("no_post", "strategy", "without post-training", without_post),
  ("no_id", "strategy", "without ID' before mining", lambda c: stage(c, "interaction", steps=0)),
  ("no_id_in_cascade", "strategy", "without ID' in the cascade", without("nll_li", "kl_li_de")),
  ("no_dualreg", "strategy", "without DualReg", without_dualreg),
  ("no_cross_batch", "strategy", "without cross-batch", without_cross_batch),
  ("no_denoising", "strategy", "without denoising", lambda c: stage(c, "mine", denoise=None, margin=None)),
)


def read(c: Config) -> Config:
  """The configuration without the settings of stages that are left out."""
  idle = [name for name in recipe.TRAINED if not getattr(c, name).steps]
  return dataclasses.replace(c, **{name: dataclasses.replace(getattr(Config(), name), steps=0) for name in idle})


def grid(full: Config, names: Sequence[str], own: dict[str, Config]) -> tuple[list[Row], dict[str, str]]:
  """The rows that names of rows and groups pick, `full` always first; and why others of these are left out.

  `own` are further rows, in the group of that name. `UserError` for a name that is neither row nor group, for one of
  `own` that is taken or cannot be a folder's, and for another data set there.
  """
  known = [name for name, *_ in ROWS]
  for name, c in own.items():
    if name in (*known, *GROUPS, "shared") or not re.fullmatch(r"\w[\w.+-]*", name):
      raise UserError(f"rows[{name!r}]: is taken, or no name of a folder: use other letters, digits and _")
    if c.data != full.data:
      raise UserError(f"rows[{name!r}].data: differs from config.data: rows are compared on the same queries")
  for name in names:
    if name not in (*known, *GROUPS, *own):
      raise UserError(
        f"--rows {name}: no such row; known are {', '.join([*known, *own])}; and the groups {', '.join(GROUPS)}"
      )
  picked = lambda name, group: name == "full" or name in names or group in names
  rows, left_out = [], {}
  for name, group, label, change in ROWS:
    if picked(name, group):
      try:
        rows.append(Row(name, group, label, change(full)))
      except UserError as error:
        left_out[name] = str(error)
  rows += [Row(name, "own", name, c) for name, c in own.items() if picked(name, "own")]
  for row in rows[1:]:
    if read(row.config) == read(full):
      left_out[row.name] = "is the full configuration"
  return [row for row in rows if row.name not in left_out], left_out


# ---- Running them --------------------------------------------------------------------------------------------------

SECTIONS = ("post", "interaction", "mine", "warmup", "cascade")  # of the configuration, in the order of their stages
SERVES = {"check": "warmup", "denoise": "warmup"}  # stages without a section of their own


def ablate(
  full: Config,
  directory: Path,
  seeds: Sequence[int],
  names: Sequence[str] = USUAL,
  own: dict[str, Config] | None = None,
  fresh: bool = False,
) -> dict[str, Any]:
  """Runs, or continues, the rows under every seed; returns what `ablation.json` holds.

  Seed by seed, and the table is written after each. What another call left in the folder stays in the table; what
  another process is at is left to it, and the table is empty until `full` is measured. Raises `UserError` as `grid` and
  `recipe.run` do.
  """
  start = time.monotonic()
  own = own or {}
  rows, left_out = grid(full, names, own)
  for row in rows:
    recipe.divides(row.config)
  if not seeds:
    raise UserError("--seeds: name at least one")
  for seed in seeds:
    dataclasses.replace(full, seed=seed)  # checks it
  recipe.claim(directory, full, fresh, "ablation", FILE)
  everything, left_out_of_all = grid(full, GROUPS, own)
  for row in everything:  # what is there will be in the table: it must be this row
    for done, place in finished(directory / row.name).items():
      recipe.claim(place, dataclasses.replace(row.config, seed=int(done)), fresh=False)
  for name, why in left_out.items():
    say(f"row {name} is left out: {why}")
  table: dict[str, Any] = {}
  with jax.set_mesh(mesh.make()):
    bases: dict[Path, recipe.Run] = {}
    for row in rows:
      place = based(directory, row)
      if place not in bases:
        with columns.locked(recipe.folder(place) / LOCK):
          bases[place] = begin(place, row)
      base = bases[place]
      recipe.suits(row.config, base.data, base.params["student"].encoder.architecture)  # now, not after hours
    begun: dict[Path, recipe.Begun] = {}
    for seed in dict.fromkeys(seeds):
      for row in rows:
        # Without a cascade the seed changes nothing: once.
        own_seed = seed if row.config.cascade.steps else row.config.seed
        place = directory / row.name / str(own_seed)
        with columns.locked(recipe.folder(place.parent) / f"{own_seed}{LOCK}", wait=False) as mine:
          say(f"row {row.name}, seed {own_seed}" + ("" if mine else ": another process is at it"))
          if mine:
            run(row, own_seed, place, bases[based(directory, row)], begun)
      if finished(directory / "full"):
        with columns.locked(directory / LOCK):  # the last to write has seen all
          table = summary(full, directory, everything, left_out_of_all, bases[based(directory, rows[0])])
          write(table, directory)
  say(f"done in {clock(time.monotonic() - start)}" + (f": {directory / 'ablation.md'}" if table else ""))
  return table


def digest(c: Config, name: str) -> str:
  """12 hex digits of all that a stage before the cascade, and those before it, may read of a configuration."""
  read = dataclasses.asdict(c)
  if name in ("prepare", "baselines"):
    # Post-training brings texts and a head of its own, which are there from the beginning.
    read = {field: read[field] for field in ("seed", "data", "model", "post")}
  else:
    for later in SECTIONS[SECTIONS.index(SERVES.get(name, name)) + 1 :]:
      read.pop(later, None)
  if name == "check":  # it judges the score that the cascade teaches, and its temperatures, in lists like its own
    cascade = dataclasses.asdict(c.cascade)
    read["cascade"] = {field: cascade[field] for field in ("residual", "temperature", "negatives", "hardest")}
  if "mine" in read:  # these are read later
    del read["mine"]["refresh"]
    if name != "denoise":
      del read["mine"]["denoise"], read["mine"]["margin"]
  # A field that a later version brings has its default, and changes nothing.
  usual = config.flat(dataclasses.asdict(Config()))
  said = {field: value for field, value in config.flat(read).items() if field not in usual or usual[field] != value}
  return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def based(directory: Path, row: Row) -> Path:
  """The folder of data, tokenizer, baselines, and all that rows share on them."""
  return directory / "shared" / digest(row.config, "prepare")


def begin(place: Path, row: Row) -> recipe.Run:
  """Data and parameters to start from; BM25 and zero-shot are measured."""
  base = recipe.prepare(place, row.config)
  base.stage("baselines", lambda _: recipe.baselines(base))
  return base


def stages(c: Config) -> list[str]:
  """The stages before the cascade that a configuration has, but for `prepare` and `baselines`."""
  idle = {name for name in recipe.TRAINED if not getattr(c, name).steps}
  idle |= set() if c.mine.judged and c.cascade.steps else {"denoise"}
  idle |= set() if c.cascade.steps and c.cascade.needs_cross else {"check"}
  every = recipe.STAGES[recipe.STAGES.index("baselines") + 1 : recipe.STAGES.index("cascade")]
  return [name for name in every if name not in idle]


def link(base: recipe.Run, c: Config, place: Path) -> dict[str, str]:
  """Links from a folder to the shared stages before its cascade; gives {stage: what its shared folder is called}."""
  homes = {name: f"{name}-{digest(c, name)}" for name in stages(c)}
  for name, home in {"prepare": "prepare", "baselines": "baselines", **homes}.items():
    target = recipe.folder(base.directory / home)
    if not (place / name).is_symlink():
      (place / name).symlink_to(os.path.relpath(target, place))
  return homes


def run(row: Row, seed: int, place: Path, base: recipe.Run, begun: dict[Path, recipe.Begun]) -> None:
  """Runs, or continues, a row under a seed in its folder; `begun` keeps what the last row's cascade began with.

  When it is measured, its checkpoints and vectors are deleted: many rows would fill a disk.
  """
  own = dataclasses.replace(row.config, seed=seed)
  recipe.claim(place, own, fresh=False)
  if not (place / "evaluate" / "manifest.json").is_file():
    homes = link(base, row.config, place)
    key = base.directory / "+".join(homes.values())
    if key not in begun:
      begun.clear()  # parameters: those of one start at a time
      with columns.locked(base.directory / LOCK):
        begun[key] = recipe.before_cascade(dataclasses.replace(base, directory=place, config=row.config))
    current = dataclasses.replace(base, directory=place, config=own)
    params = recipe.fit(current, "cascade", begun[key].params, begun[key].negatives)
    current.stage("encode", lambda folder: recipe.encode(current, params, folder))
    current.stage("evaluate", lambda folder: measure(current, params, folder))
  shutil.rmtree(place / "cascade" / "checkpoints", ignore_errors=True)
  shutil.rmtree(place / "encode", ignore_errors=True)


def measure(current: recipe.Run, params: Params, folder: Path) -> dict[str, Any]:
  """Test metrics of the cascade's student, whose digest is beside them; each query's values in `per_query.json`."""
  found, _ = recipe.measure_student(current, "cascade", params)
  values = {system: per_query(current.directory, current.data.qrels("test"), f"{system}.cascade") for system in SYSTEMS}
  config.write(folder / "per_query.json", json.dumps(values))
  about = collection.describe(current.directory / "encode")
  return {**found, "dev": recipe.read(current.directory / "encode" / "manifest.json")["dev"], "student": about["model"]}


def per_query(directory: Path, qrels: evaluate.Qrels, name: str) -> dict[str, dict[str, float]]:
  """{measure: {query: value}} of a ranking of the test split in a run's folder."""
  ranking = evaluate.read_run(directory / "runs" / f"test.{name}.trec")
  return evaluate.values(ranking, qrels, evaluate.MEASURES)


# ---- The table -----------------------------------------------------------------------------------------------------

Values = dict[str, dict[str, float]]  # measure -> query -> value


def summary(
  full: Config, directory: Path, rows: Sequence[Row], left_out: dict[str, str], base: recipe.Run
) -> dict[str, Any]:
  """What `ablation.json` holds, from all finished runs of these rows in the folder."""
  qrels = base.data.qrels("test")
  files = {row.name: finished(directory / row.name) for row in rows}
  rows = [row for row in rows if files[row.name]]
  values = {
    row.name: {seed: recipe.read(place / "evaluate" / "per_query.json") for seed, place in files[row.name].items()}
    for row in rows
  }
  lines: list[dict[str, Any]] = [
    {"name": name, "label": label, "group": "baseline", "changes": {}, "folders": {}, "check": None}
    | compared({"": {"dual": per_query(base.directory, qrels, name)}}, values["full"])
    for name, label in (("bm25", "BM25"), ("zero_shot", "zero-shot"))
  ]
  for row in rows:
    check = next(iter(files[row.name].values())) / "check" / "manifest.json"
    about = {
      "name": row.name,
      "label": row.label,
      "group": row.group,
      "changes": row.changes(full),
      "folders": {seed: str(place.relative_to(directory)) for seed, place in files[row.name].items()},
      "check": recipe.read(check) if check.is_file() else None,
    }
    lines.append(about | compared(values[row.name], values["full"]))
  prepared = recipe.read(base.directory / "prepare" / "manifest.json")
  return {
    "config": dataclasses.asdict(full),
    "data": {"name": full.data.name, **prepared["data"]},
    "start": prepared["start"],
    "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    "seeds": sorted({int(seed) for row in rows if row.config.cascade.steps for seed in files[row.name]}),
    "measures": list(evaluate.MEASURES),
    "compared": list(SHOWN),
    "caption": caption(full, prepared["data"]),
    "left_out": left_out,
    "rows": lines,
  }


def finished(directory: Path) -> dict[str, Path]:
  """{seed: folder} of a row's runs that are measured."""
  found = [path.parent.parent for path in directory.glob("*/evaluate/manifest.json")]
  seeds = [path for path in found if path.name.isdigit()]
  return {path.name: path for path in sorted(seeds, key=lambda path: int(path.name))}


def compared(runs: dict[str, dict[str, Values]], full: dict[str, dict[str, Values]]) -> dict[str, Any]:
  """Of runs {seed: {system: values}}: each seed's metrics, mean and deviation over seeds, the difference to full's.

  `seeds` is {seed: {system: {measure: value}}}; `mean` and `deviation` are {system: {measure: value}}, the latter the
  sample's, None for one seed. `minus_full` is {system: {measure: {difference, low, high, p}}} of `SHOWN`, None for
  `full` itself: each query's values are averaged over seeds, then compared over queries.
  """
  systems = list(next(iter(runs.values())))
  seeds = {seed: {s: {m: evaluate.mean(v) for m, v in own[s].items()} for s in systems} for seed, own in runs.items()}
  over = lambda pick: {s: {m: pick([own[s][m] for own in seeds.values()]) for m in evaluate.MEASURES} for s in systems}
  minus = None
  if runs is not full:
    minus = {s: {m: difference(averaged(runs, s, m), averaged(full, s, m)) for m in SHOWN} for s in systems}
  deviation = over(statistics.stdev) if len(runs) > 1 else None
  return {"seeds": seeds, "mean": over(statistics.fmean), "deviation": deviation, "minus_full": minus}


def difference(row: dict[str, float], full: dict[str, float]) -> dict[str, float]:
  """Of each query's values: the mean difference, its 95 % interval, and p."""
  found = dict(zip(("difference", "low", "high"), evaluate.bootstrap(row, full)))
  return found | {"p": evaluate.p_value(row, full)}


def averaged(runs: dict[str, dict[str, Values]], system: str, measure: str) -> dict[str, float]:
  """Each query's value, its mean over seeds."""
  each = [own[system][measure] for own in runs.values()]
  return {query: statistics.fmean(own[query] for own in each) for query in each[0]}


def caption(full: Config, data: dict[str, Any]) -> str:
  return (
    f"{data['queries']['test']:,} test queries over {data['passages']:,} passages ({data['fingerprint']}). DE is the "
    f"dual-encoder, LI late interaction over its {full.evaluate.late_depth} best. Mean ± standard deviation over seeds "
    f"of the cascade; all stages before it have seed {full.seed} and are shared by the rows whose configurations agree "
    "there. Δ is the difference to full, p that of a two-sided paired randomisation test over queries, each query's "
    "values averaged over a row's seeds: it tells what other queries might show, not other seeds, and is not corrected "
    "for the number of comparisons."
  )


def write(table: dict[str, Any], directory: Path) -> None:
  """`ablation.json`, `.md`, `.csv` and `.svg`."""
  config.write(directory / "ablation.json", json.dumps(table, indent=2))
  config.write(directory / "ablation.md", markdown(table))
  config.write(directory / "ablation.csv", comma_separated(table))
  config.write(directory / "ablation.svg", plot(table))


def cells(table: dict[str, Any]) -> list[list[str]]:
  """The table as text, its head first."""
  pairs = [(s, m) for s in SYSTEMS for m in SHOWN]
  titles = [f"{SYSTEMS[s]} {m}" for s, m in pairs]
  lines = [["row", *titles, "seeds", *(f"Δ {title} (p)" for title in titles)]]
  for row in table["rows"]:
    line = [row["label"]]
    for system, measure in pairs:
      value = f"{row['mean'][system][measure]:.3f}" if system in row["mean"] else "–"
      line.append(f"{value} ± {row['deviation'][system][measure]:.3f}" if row["deviation"] else value)
    line.append(str(len(row["folders"])) if row["folders"] else "–")
    for system, measure in pairs:
      own = (row["minus_full"] or {}).get(system, {}).get(measure)
      line.append(f"{own['difference']:+.3f} ({own['p']:.4f})" if own else "–")
    lines.append(line)
  return lines


def markdown(table: dict[str, Any]) -> str:
  head, *lines = cells(table)
  rule = ["---", *["--:"] * (len(head) - 1)]
  text = "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))
  text += f"\n{table['caption']}\n"
  text += "".join(f"\nLeft out: `{name}`: {why}.\n" for name, why in table["left_out"].items())
  return text


def comma_separated(table: dict[str, Any]) -> str:
  """A line for each row and all its numbers, every digit of them; what is not there is empty."""
  columns = [(s, m) for s in SYSTEMS for m in table["measures"]]
  against = [(s, m, kind) for s in SYSTEMS for m in table["compared"] for kind in ("difference", "low", "high", "p")]
  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(
    ["name", "label", "group", "seeds"]
    + [f"{s}.{m}.{kind}" for s, m in columns for kind in ("mean", "deviation")]
    + [f"{s}.{m}.minus_full.{kind}" for s, m, kind in against]
  )
  for row in table["rows"]:
    of = lambda what, s, m: ((row[what] or {}).get(s) or {}).get(m, "")
    numbers = [of(what, s, m) for s, m in columns for what in ("mean", "deviation")]
    numbers += [(of("minus_full", s, m) or {}).get(kind, "") for s, m, kind in against]
    writer.writerow([row["name"], row["label"], row["group"], " ".join(row["folders"]), *numbers])
  return file.getvalue()


def plot(table: dict[str, Any]) -> bytes:
  """A panel for each system: a dot for each seed; the mean, with the 95 % interval of its difference to full; SVG.

  The axes hold the ablation's rows. A baseline that lies far off is a number at the edge.
  """
  import matplotlib
  from matplotlib.figure import Figure

  rows, measure, blue = table["rows"], PLOTTED, "#1f5fa8"
  full = next(row for row in rows if row["name"] == "full")
  with matplotlib.rc_context({"svg.hashsalt": "ablation", "font.size": 9}):
    figure = Figure(figsize=(10, 1.4 + 0.26 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(SYSTEMS), sharey=True)
    for panel, (system, short) in zip(panels, SYSTEMS.items()):
      line = full["mean"][system][measure]
      panel.axvline(line, color="0.6", linewidth=0.8, zorder=0)
      drawn = sorted(enumerate(rows), key=lambda pair: pair[1]["group"] == "baseline")  # last, when the axis is set
      for y, row in [(y, row) for y, row in drawn if system in row["mean"]]:
        mean, own = row["mean"][system][measure], (row["minus_full"] or {}).get(system, {}).get(measure)
        if row["group"] == "baseline":
          panel.set_xlim(panel.get_xlim())
          left, right = panel.get_xlim()
          if not left <= mean <= right:
            at, side, text = (left, "left", f"◂ {mean:.3f}") if mean < left else (right, "right", f"{mean:.3f} ▸")
            panel.text(at, y, text, ha=side, va="center", color=blue)
            continue
        if own:
          panel.plot([line + own["low"], line + own["high"]], [y, y], color=blue, linewidth=1.4, zorder=1)
        seeds = [values[system][measure] for values in row["seeds"].values()]
        if len(seeds) > 1:
          panel.plot(seeds, [y] * len(seeds), "o", color="#e08214", markersize=3.5, alpha=0.9, zorder=2)
        panel.plot([mean], [y], "D", color=blue, markersize=4.5, zorder=3)
      panel.set_title(f"{short}: {measure}")
      panel.grid(axis="x", color="0.9", linewidth=0.6)
      panel.set_axisbelow(True)
      for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
      panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(rows)), [row["label"] for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.supxlabel(
      "Diamond: mean, with the 95 % interval of its difference to full (queries drawn again). Dots: seeds. Line: full.",
      fontsize=8,
    )
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
  return file.getvalue()
