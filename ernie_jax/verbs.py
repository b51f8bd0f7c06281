"""The verbs of the command line: the flags of each, and what it does with them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from ernie_jax.config import Architecture, Config, Data, DataName, Hosts, UserError
from ernie_jax.signals import SIGNALS

if TYPE_CHECKING:
  import numpy as np

  from ernie_jax.search import Hit

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Run:
  """Runs the whole strategy in a folder, or continues it there."""

  output: Path  # the run's folder
  config: Annotated[Config, tyro.conf.arg(name="")]  # its fields are flags without a prefix
  hosts: Annotated[Hosts, tyro.conf.arg(name="")]  # --multihost and its settings
  fresh: bool = False  # delete what the folder holds of an earlier run, and start anew


@dataclasses.dataclass(frozen=True)
class Search:
  """Searches the corpus of a finished run with its dual-encoder."""

  run: Annotated[Path, tyro.conf.Positional]  # the run's folder
  query: Annotated[str | None, tyro.conf.Positional] = None  # without one: a prompt
  k: int = 10  # passages to show


@dataclasses.dataclass(frozen=True)
class Serve:
  """Serves a page that searches a finished run or a collection, and the JSON behind it, until Ctrl-C."""

  directory: Annotated[Path, tyro.conf.Positional]  # the run's or the collection's folder
  host: str = "127.0.0.1"  # address to listen on; the default is reached from this machine only
  port: int = 8000  # 0: a free one


@dataclasses.dataclass(frozen=True)
class Plan:
  """Compiles a stage's training step for a TPU slice, without a TPU, and says what it would take."""

  config: Annotated[Config, tyro.conf.arg(name="")]  # its fields are flags without a prefix
  topology: str = "v5e:16x16"  # the slice: v5e:RxC, v6e:RxC or v5p:AxBxC chips
  stage: Literal["interaction", "warmup", "cascade"] = "cascade"
  sweep: bool = False  # 16, 32, 64, 128 and 256 chips, with the batch per chip that topology has


@dataclasses.dataclass(frozen=True)
class Prepare:
  """Prepares a data set in the cache, and shows what is in it."""

  name: Annotated[DataName, tyro.conf.Positional]  # which data set: `ernie_jax/datasets/NAME.py` says its files
  folder: Annotated[str, tyro.conf.arg(name="from")] = ""  # where its files lie; docstrings have none
  skip_bad: int = 0  # most bad lines that are left out and counted; one more is an error
  start: str = ""  # checkpoint directory whose tokenizer counts lengths; empty: a vocabulary built from the corpus
  packages: tuple[str, ...] = Data.packages  # docstrings: whose
  cache: str = Data.cache  # prepared data sets, shared by all runs
  query_length: int = Data.query_length  # tokens, special ones included
  passage_length: int = Data.passage_length


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """Measures runs against relevance judgements, and compares each run with the first."""

  qrels: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="QRELS")]  # the judgements: lines `qid 0 pid rel`
  # what systems found: lines `qid Q0 pid rank score tag`
  runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
  measures: tuple[str, ...] = ("MRR@10", "R@5", "R@20", "R@50", "R@100", "R@1000", "nDCG@10")  # ir_measures' names
  per_query: str = ""  # a file for the measures of each query, tab-separated; with -, they are all that is printed


def parse(kind: type[T], verb: str, args: Sequence[str], default: Any = None) -> T:
  """Typed flags over a default; a wrong flag becomes one line."""
  errors = io.StringIO()
  try:
    with contextlib.redirect_stderr(errors):
      # An optional part of the configuration is flags where the file has it, and not a subcommand.
      flat = (tyro.conf.AvoidSubcommands,)
      return tyro.cli(kind, args=list(args), default=default, prog=f"ernie-jax {verb}", config=flat)
  except SystemExit as end:
    if not end.code:
      raise
    # tyro draws a box of several lines with a title: keep its words, up to the help that it repeats.
    plain = re.sub(r"\x1b\[[0-9;]*m|[\u2500-\u257f]|-{10,}", " ", errors.getvalue())
    _, *inside = (line.strip() for line in plain.splitlines() if line.strip())
    words = re.split(r"Argument helptext|For full helptext", " ".join(inside))[0].strip()
    raise UserError(f"{words}; `ernie-jax {verb} --help` lists all flags") from None


def load_config(path: str) -> Config:
  """The `config` of a configuration file."""
  if not Path(path).is_file():
    raise UserError(f"{path}: no such configuration file; try configs/quickstart.py")
  sys.path.insert(0, str(Path(path).resolve().parent))  # a configuration may import another one beside it
  try:
    found = runpy.run_path(path).get("config")
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  except Exception as error:  # whatever a Python file can raise
    raise UserError(f"{path}: {type(error).__name__}: {error}") from error
  finally:
    del sys.path[0]
  if not isinstance(found, Config):
    raise UserError(f"{path}: defines no `config = Config(...)`")
  return found


def named_config(args: Sequence[str], verb: str, example: str) -> tuple[bool, Config]:
  """Whether a configuration file stands first, and its configuration; none is needed for help."""
  named = bool(args) and not args[0].startswith("-")
  if not named and "--help" not in args and "-h" not in args:
    raise UserError(f"{verb}: name a configuration file first, such as `ernie-jax {verb} {example}`")
  return named, load_config(args[0]) if named else Config()


def run(args: Sequence[str]) -> None:
  named, settings = named_config(args, "run", "configs/quickstart.py")
  output = Path("runs") / (Path(args[0]).stem if named else "NAME")
  chosen = parse(Run, "run CONFIG", args[named:], Run(output, settings, Hosts()))
  import absl.logging
  import jax

  from ernie_jax import mesh

  mesh.join(chosen.hosts)  # before anything touches a device, as an import below does
  from ernie_jax import evaluate, progress, recipe

  if not chosen.hosts.multihost:  # else JAX holds SIGTERM, and all processes answer it together
    SIGNALS.take(signal.SIGTERM)
  if not mesh.leads():
    progress.silence()
  if chosen.hosts.multihost:
    progress.say(f"{jax.process_count()} processes, {jax.device_count()} devices")
  absl.logging.set_verbosity(absl.logging.FATAL)  # a save that fails in the background: the error is shown once, here
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  results = recipe.run(chosen.config, chosen.output, chosen.fresh)
  if not mesh.leads():
    return
  print(evaluate.table({name: results[name] for name in evaluate.SYSTEMS}))
  print(f"{chosen.output}: metrics.json, report.html, runs/, model/")
  print(f"next: ernie-jax search {chosen.output}")


def data(args: Sequence[str]) -> None:
  chosen = parse(Prepare, "data", args)
  if chosen.name != "docstrings" and not chosen.folder:
    raise UserError(f"data {chosen.name}: name the folder with its files: --from DIR")
  settings = Data(**{f.name: x for f in dataclasses.fields(Data) if (x := getattr(chosen, f.name, None)) is not None})
  from ernie_jax import datasets, tokens

  start = Path(chosen.start).expanduser()
  tokenizer = tokens.Tokenizer.load(start) if chosen.start else None  # now, not after the preparation
  found = datasets.load(settings)
  tokenizer = tokenizer or tokens.Tokenizer.train(found.corpus.passages, Architecture().vocabulary)
  print(f"{settings.name}: fingerprint {found.fingerprint}, in {found.summary['folder']}")
  print(f"{'':8} {'rows':>9}  tokens: {'p50':>5} {'p90':>5} {'p99':>5} {'max':>6}  cut off")
  for split in ("corpus", *datasets.SPLITS):
    lengths = tokens.store(found, split, tokenizer, settings).lengths
    longest = settings.passage_length if split == "corpus" else settings.query_length
    print(f"{split:8} {len(lengths):9,}  {spread(lengths, longest)}")
  given = found.queries["train"].negatives.lengths
  print(f"negatives of a training query: {given.mean() if len(given) else 0:.1f}, {(given > 0).sum():,} have some")
  for what in ("skipped", "left_out"):
    counts = ", ".join(f"{count:,} {kind}" for kind, count in found.summary[what].items())
    print(f"{what.replace('_', ' ')}: {counts or 'nothing'}")
  split = next((split for split in datasets.SPLITS if len(found.queries[split].ids)), "train")
  queries = found.queries[split]
  for row in range(0, len(queries.ids), max(1, len(queries.ids) // 5))[:5]:
    passage = found.corpus.passages[int(queries.positives[row][0])]
    print(f"{shorten(queries.texts[row], 60)} -> {shorten(passage, 80)}")
  if missing := [split for split in datasets.SPLITS if not len(found.queries[split].ids)]:
    print(f"no {' and no '.join(missing)} queries: `ernie-jax run` needs all three splits")
    return
  flags = ["--data.name", settings.name]
  for field in ("folder", "skip_bad", "packages", "cache", "query_length", "passage_length"):
    value = getattr(settings, field)
    if value != getattr(Data, field) or field.endswith("length"):  # the configuration may have others
      flags += [f"--data.{field.replace('_', '-')}", *(value if field == "packages" else [str(value)])]
  flags += ["--model.start", chosen.start] if chosen.start else []
  print(f"next: ernie-jax run configs/quickstart.py {shlex.join(flags)} --output runs/{settings.name}")


def spread(lengths: np.ndarray, longest: int) -> str:
  """Percentiles of lengths in tokens, and how many are longer than fits beside [CLS] and [SEP]."""
  import numpy as np

  if not len(lengths):
    return ""
  p50, p90, p99 = np.percentile(lengths, [50, 90, 99])
  cut = np.mean(lengths > longest - 2)
  return f"{'':8}{p50:5.0f} {p90:5.0f} {p99:5.0f} {lengths.max():6}  {cut:.1%} at {longest}"


def shorten(text: str, width: int) -> str:
  """A text on one line: its beginning, if it is longer than `width`; it may have no spaces."""
  text = " ".join(text.split())
  return text if len(text) <= width else text[: width - 4] + " ..."


def search(args: Sequence[str]) -> None:
  chosen = parse(Search, "search", args)
  if chosen.k < 1:
    raise UserError(f"--k {chosen.k}: must be at least 1")
  from ernie_jax.search import Searcher

  searcher = Searcher(chosen.run)
  if chosen.query is not None:
    show(searcher.search([chosen.query], chosen.k)[0])
    return
  print(f"{searcher.about['passages']} passages; an empty line ends")
  with contextlib.suppress(EOFError):
    while query := input("query> ").strip():
      show(searcher.search([query], chosen.k)[0])


def evaluate(args: Sequence[str]) -> None:
  chosen = parse(Evaluate, "evaluate", args)
  if not chosen.runs:
    raise UserError(f"evaluate {chosen.qrels}: name a run to measure: `ernie-jax evaluate QRELS RUN [RUN ...]`")
  from ernie_jax import config, progress
  from ernie_jax import evaluate as measuring

  measuring.parsed(chosen.measures)  # now, not after files of millions of lines
  qrels = measuring.read_qrels(chosen.qrels)
  found = {}
  for path in chosen.runs:
    run = measuring.read_run(path)
    both = len(run.keys() & qrels.keys())
    if not both:
      raise UserError(f"{path}: none of its {len(run):,} queries is judged in {chosen.qrels}; give this run's qrels")
    if both < len(qrels):
      progress.say(f"{path}: lacks {len(qrels) - both:,} of {len(qrels):,} judged queries, they count 0")
    if both < len(run):
      progress.say(f"{path}: {len(run) - both:,} of {len(run):,} queries are not judged, they do not count")
    name = path.name if [p.name for p in chosen.runs].count(path.name) == 1 else str(path)
    found[name] = measuring.values(run, qrels, chosen.measures)
    del run  # it may take a gigabyte: one at a time
  if chosen.per_query:
    lines = ["\t".join(["query", "run", *chosen.measures])]
    lines += [
      "\t".join([query, name, *(repr(own[query]) for own in values.values())])
      for query in qrels
      for name, values in found.items()
    ]
    if chosen.per_query == "-":
      print("\n".join(lines))
      return
    config.write(Path(chosen.per_query), "\n".join(lines) + "\n")
  means = [[name, *(f"{measuring.mean(own):.4f}" for own in values.values())] for name, values in found.items()]
  print(measuring.aligned([["", *chosen.measures], *means]))
  (first, base), *others = found.items()
  for name, values in others:
    rows = [[f"{name} - {first}", "difference", "95 % from", "to", "p"]]
    for measure, own in values.items():
      interval = (f"{x:+.4f}" for x in measuring.bootstrap(own, base[measure]))
      rows.append([measure, *interval, f"{measuring.p_value(own, base[measure]):.4f}"])
    print(f"\n{measuring.aligned(rows)}")


def plan(args: Sequence[str]) -> None:
  named, settings = named_config(args, "plan", "configs/msmarco.py --topology v5e:16x16")
  chosen = parse(Plan, "plan CONFIG", args[named:], Plan(settings))
  from ernie_jax import plan as planning

  if chosen.sweep:
    for line in planning.sweep(chosen.config, chosen.stage, chosen.topology):
      print(line, flush=True)
    return
  print(planning.table(planning.plan(chosen.config, chosen.stage, chosen.topology)))


def serve(args: Sequence[str]) -> None:
  chosen = parse(Serve, "serve", args)
  try:
    import fastapi  # noqa: F401
    import uvicorn  # noqa: F401
  except ImportError as error:
    raise UserError(f"serve: {error.name} is not installed; pip install 'ernie-jax[serve]'") from error
  from ernie_jax import progress
  from ernie_jax import serve as service
  from ernie_jax.search import Searcher

  with service.listen(chosen.host, chosen.port) as own:  # first, for it fails at once
    searcher = Searcher(chosen.directory)
    service.warm(searcher)
    progress.silence()  # each request would say what it encodes
    api = service.app(searcher, service.names(chosen.host), service.examples(searcher))
    SIGNALS.take(signal.SIGTERM)
    print(f"{searcher.about['passages']:,} passages at {service.address(chosen.host, own)}", flush=True)
    service.server(api).run([own])


def show(hits: list[Hit]) -> None:
  for rank, hit in enumerate(hits, 1):
    print(f"{rank:3d}  {hit.score:6.3f}  {hit.title}\n             {shorten(hit.text, 160)}")


VERBS = {"run": run, "search": search, "evaluate": evaluate, "serve": serve, "data": data, "plan": plan}
