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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from ernie_jax.config import Architecture, Config, Data, DataName, Hosts, Stage, UserError
from ernie_jax.signals import SIGNALS

if TYPE_CHECKING:
  import numpy as np

  from ernie_jax.evaluate import Qrels, Run
  from ernie_jax.search import Hit, Searcher

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Train:
  """Runs the whole strategy in a folder, or continues it there."""

  output: Path  # the run's folder
  config: Annotated[Config, tyro.conf.arg(name="")]  # its fields are flags without a prefix
  hosts: Annotated[Hosts, tyro.conf.arg(name="")]  # --multihost and its settings
  fresh: bool = False  # delete what the folder holds of an earlier run, and start anew


@dataclasses.dataclass(frozen=True)
class Ablate:
  """Measures what each part of the method contributes; the same command continues, and further rows are added.

  Groups of rows: loss (without each term, pairs and all of them), controls (DE only, no teacher, uniform teacher, no
  cascade), strategy (without a stage or technique), own (those in the configuration file's `rows = {name: config}`).
  """

  output: Path  # the folder of the table, and of a run for each row and seed
  config: Annotated[Config, tyro.conf.arg(name="")]  # its fields are flags without a prefix
  seeds: tuple[int, ...] = (0, 1, 2)  # of the cascade; what comes before has --seed, once for all rows
  rows: tuple[str, ...] = ()  # names of rows and groups; empty: loss and controls. `full` is always among them
  fresh: bool = False  # delete what the folder holds of an earlier ablation, and start anew


@dataclasses.dataclass(frozen=True)
class Encode:
  """Encodes a corpus, or the queries of a split, into a folder; the same command continues after an interruption."""

  model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]  # a finished run
  name: Annotated[DataName | None, tyro.conf.Positional] = None  # another data set than the run's
  folder: Annotated[str, tyro.conf.arg(name="from")] = ""  # where its files lie
  output: Path = Path("encoded")
  texts: Literal["corpus", "train", "dev", "test"] = "corpus"  # or the queries of a split
  late: Literal["no", "16", "8"] = "no"  # token vectors for late interaction too, with so many bits a number
  dtype: Literal["float32", "float16"] = "float32"  # of the vectors on disk
  skip_bad: int = 0  # most bad lines that are left out and counted; one more is an error
  hosts: Annotated[Hosts, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Hosts)  # --multihost and so on


@dataclasses.dataclass(frozen=True)
class Index:
  """Builds an index over an encoded corpus, or adds to it what it lacks; prints its recall."""

  directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]  # a finished run, or an encoded corpus
  index: str  # flat, hnsw or ivfpq (FAISS), milvus:FILE.db (in this process) or milvus:http://HOST:19530
  model: Path | None = None  # where the model lies, if not where it lay when it encoded


@dataclasses.dataclass(frozen=True)
class Search:
  """Searches a finished run or an encoded corpus."""

  directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]  # a finished run, or an encoded corpus
  query: Annotated[str | None, tyro.conf.Positional] = None  # without one, and without --queries: a prompt
  k: int = 10  # passages to show
  how: Annotated[Literal["bm25", "dual", "late", "cross", "hybrid"], tyro.conf.arg(name="with")] = "dual"
  depth: int = (
    100  # late and cross re-rank so many of the dual-encoder's best, at least k; hybrid fuses so many of both
  )
  index: str = (
    ""  # as built by `ernie-jax index`; empty: exact search; approx: the TPU's approximate top-k, recall 0.95
  )
  queries: Path | None = None  # lines `id TAB query`
  output: Path | None = None  # with --queries: a TREC run instead of what people read
  model: Path | None = None  # where the model lies, if not where it lay when it encoded


@dataclasses.dataclass(frozen=True)
class Mine:
  """Mines hard negatives of a split's queries with a finished run's student; its cross-encoder takes out right ones.

  With --denoise or --margin the cross-encoder reads all that is found, and the known positives; its logits are written
  too, beside the negatives (negatives.cross.trec). With --margin None alone it reads nothing, which is much faster.
  """

  run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]  # a finished run, or an encoded corpus
  first: int = 1  # ranks of the student, known positives and passages with their texts left out
  last: int = 30
  sample: int | None = None  # so many of these ranks, drawn; None: all
  denoise: float | None = None  # drop those with a larger probability: for a cross-encoder trained on single pairs
  margin: float | None = 0.0  # drop those that do not come so many logits below the best known positive
  split: Literal["train", "dev", "test"] = "train"  # whose queries
  seed: int = 0  # of --sample
  output: Path = Path("negatives.trec")


@dataclasses.dataclass(frozen=True)
class Serve:
  """Serves a page that searches a finished run or an encoded corpus, and the JSON behind it, until Ctrl-C."""

  directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]  # a finished run, or an encoded corpus
  host: str = "127.0.0.1"  # address to listen on; the default is reached from this machine only
  port: int = 8000  # 0: a free one
  index: str = ""  # as built by `ernie-jax index`; empty: exact search without one
  model: Path | None = None  # where the model lies, if not where it lay when it encoded


@dataclasses.dataclass(frozen=True)
class Import:
  """Makes a model for `encode`, `search`, `export` and `model.start` of released weights."""

  # a folder or a hub id: Hugging Face (bert, ernie), sentence-transformers, PyLate, PaddleNLP, RocketQA, a run
  source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
  output: Path = Path("imported")  # a new folder
  cross: str = ""  # the same for its cross-encoder, whose vocabulary must be the same
  layers: tuple[int, ...] = ()  # of the checkpoint, from 0, for a smaller model: 0 1 2, or 1 3 5; empty: all
  pooling: Literal["cls", "mean"] | None = None  # None: as the checkpoint says, else cls
  cosine: bool | None = None  # vectors of length 1; None: as the checkpoint says, else not
  pooler: bool | None = None  # the cross-encoder's tanh pooler before its logit; None: if the checkpoint has one
  epsilon: float | None = None  # LayerNorm's; None: as the checkpoint says
  query_length: int | None = None  # tokens, special ones included; None: as the checkpoint says, else 32
  passage_length: int | None = None  # None: as the checkpoint says, else 128
  cache: str = Data.cache  # of downloaded weights


@dataclasses.dataclass(frozen=True)
class Export:
  """Writes a finished run's model into a folder that another tool loads, with a model card."""

  run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]  # a finished run, or an imported model
  to: Literal["sentence-transformers", "pylate", "cross-encoder", "hf", "onnx"]
  output: Path = Path("exported")  # a new folder


@dataclasses.dataclass(frozen=True)
class Plan:
  """Compiles a stage's training step for a TPU slice, without a TPU, and says what it would take."""

  config: Annotated[Config, tyro.conf.arg(name="")]  # its fields are flags without a prefix
  topology: str = "v5e:16x16"  # the slice: v5e:RxC, v6e:RxC or v5p:AxBxC chips
  stage: Stage = "cascade"
  sweep: bool = False  # 16, 32, 64, 128 and 256 chips, with the batch per chip that topology has
  # Tokens of queries and passages on average before they are cut, which tells how many packed rows there are; MS MARCO
  # has 11 80. None: as many as if every text were the longest.
  tokens: tuple[int, int] | None = None


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

  # the judgements: lines `qid 0 pid rel`; or a finished run or an encoded corpus, whose rankings are then made
  qrels: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="QRELS")]
  # what systems found: lines `qid Q0 pid rank score tag`
  runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
  measures: tuple[str, ...] = ("MRR@10", "R@5", "R@20", "R@50", "R@100", "R@1000", "nDCG@10")  # ir_measures' names
  per_query: str = ""  # a file for the measures of each query, tab-separated; with -, they are all that is printed
  split: Literal["train", "dev", "test"] = "test"  # of an encoded corpus: whose queries
  depth: int = 100  # of an encoded corpus: late interaction and cross-encoder re-rank the dual-encoder's best
  output: Path | None = None  # of an encoded corpus: a folder for the rankings, as TREC runs
  model: Path | None = None  # of an encoded corpus: where the model lies, if not where it lay when it encoded


@dataclasses.dataclass(frozen=True)
class Report:
  """Draws one page: of a finished run its results, curves, samples and attention maps, of several a comparison."""

  # finished runs, and folders of `ernie-jax ablate`
  runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
  output: Path | None = None  # the page; None: report.html, of one run in its folder, of several here


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


def load(path: str) -> dict[str, Any]:
  """What a configuration file defines; `config` is one."""
  if not Path(path).is_file():
    raise UserError(f"{path}: no such configuration file; try configs/quickstart.py")
  sys.path.insert(0, str(Path(path).resolve().parent))  # a configuration may import another one beside it
  try:
    found = runpy.run_path(path)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  except Exception as error:  # whatever a Python file can raise
    raise UserError(f"{path}: {type(error).__name__}: {error}") from error
  finally:
    del sys.path[0]
  if not isinstance(found.get("config"), Config):
    raise UserError(f"{path}: defines no `config = Config(...)`")
  return found


def load_config(path: str) -> Config:
  """The `config` of a configuration file."""
  return load(path)["config"]


def load_rows(path: str) -> dict[str, Config]:
  """The `rows` of a configuration file: further configurations to compare."""
  rows = load(path).get("rows", {})
  if not isinstance(rows, dict) or not all(isinstance(c, Config) for c in rows.values()):
    raise UserError(f"{path}: its `rows` must be {{'name': Config(...), ...}}")
  return rows


def named_config(args: Sequence[str], verb: str, example: str) -> tuple[bool, Config]:
  """Whether a configuration file stands first, and its configuration; none is needed for help."""
  named = bool(args) and not args[0].startswith("-")
  if not named and "--help" not in args and "-h" not in args:
    raise UserError(f"{verb}: name a configuration file first, such as `ernie-jax {verb} {example}`")
  return named, load_config(args[0]) if named else Config()


def quiet() -> None:
  """A save that fails in the background is shown once, as this command's own error."""
  import absl.logging

  absl.logging.set_verbosity(absl.logging.FATAL)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def run(args: Sequence[str]) -> None:
  named, settings = named_config(args, "run", "configs/quickstart.py")
  output = Path("runs") / (Path(args[0]).stem if named else "NAME")
  chosen = parse(Train, "run CONFIG", args[named:], Train(output, settings, Hosts()))
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
  quiet()
  results = recipe.run(chosen.config, chosen.output, chosen.fresh)
  if not mesh.leads():
    return
  print(evaluate.table({name: results[name] for name in evaluate.SYSTEMS}))
  print(f"{chosen.output}: metrics.json, report.html, runs/, model/")
  print(f"next: ernie-jax search {chosen.output}")


def ablate(args: Sequence[str]) -> None:
  named, settings = named_config(args, "ablate", "configs/quickstart.py")
  output = Path("runs") / f"{Path(args[0]).stem if named else 'NAME'}-ablation"
  chosen = parse(Ablate, "ablate CONFIG", args[named:], Ablate(output, settings))
  # The flags are of every row: those of the file too.
  own = {
    name: parse(Ablate, "ablate CONFIG", args[named:], Ablate(output, c)).config
    for name, c in load_rows(args[0]).items()
  }
  from ernie_jax import mesh

  try:
    mesh.join(Hosts())
  except UserError as error:
    raise UserError(f"ablate runs in one process ({str(error).split(':')[0]}): start it without a launcher") from error
  from ernie_jax import ablate as ablation
  from ernie_jax import evaluate

  SIGNALS.take(signal.SIGTERM)
  quiet()
  rows = chosen.rows or ablation.USUAL
  table = ablation.ablate(chosen.config, chosen.output, chosen.seeds, rows, own, chosen.fresh)
  if not table:
    print(f"{chosen.output}: no table yet: another process is measuring the row full")
    return
  print(evaluate.aligned(ablation.cells(table)))
  print(f"{chosen.output}: ablation.md, ablation.csv, ablation.svg, ablation.json, and a run for each row and seed")
  print(f"next: ernie-jax report {chosen.output}")


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


def encode(args: Sequence[str]) -> None:
  chosen = parse(Encode, "encode", args)
  if chosen.name is None and chosen.folder:
    raise UserError(f"--from {chosen.folder}: name the data set too: `ernie-jax encode RUN NAME --from DIR`")
  from ernie_jax import collection, datasets, mesh, progress, tokens
  from ernie_jax.search import Model

  mesh.join(chosen.hosts)
  if not chosen.hosts.multihost:
    SIGNALS.take(signal.SIGTERM)
  if not mesh.leads():
    progress.silence()
  model = Model.load(chosen.model)
  settings = model.template.data
  if chosen.name is not None:
    folder = chosen.folder and str(Path(chosen.folder).expanduser().resolve())
    settings = dataclasses.replace(settings, name=chosen.name, folder=folder, skip_bad=chosen.skip_bad)
  with mesh.first("data"):
    found = datasets.load(settings)
    store = tokens.store(found, chosen.texts, model.template.tokenizer, settings)
  query = chosen.texts != "corpus"
  if not len(store):
    raise UserError(f"--texts {chosen.texts}: data set {settings.name!r} has no such queries")
  said = f"{found.fingerprint} {chosen.texts}" if query else found.fingerprint
  if mesh.leads():
    own = found.queries[chosen.texts] if query else found.corpus
    titles = [""] * len(store) if query else found.corpus.titles
    collection.write_texts(chosen.output, own.ids, titles, own.texts, said)
  mesh.wait("texts")
  student = model.params["student"]
  collection.write(
    chosen.output, student, model.settings, store, model.template, ".", said,
    query=query, late=chosen.late, dtype=chosen.dtype,
    source={"model": str(chosen.model.resolve()), "data": dataclasses.asdict(settings)},
  )  # fmt: skip
  if mesh.leads():
    print(f"{chosen.output}: {len(store)} {'queries' if query else 'passages'}")
    if not query:
      print(f"next: ernie-jax search {chosen.output}")


def index(args: Sequence[str]) -> None:
  chosen = parse(Index, "index", args)
  from ernie_jax.search import Searcher

  print(Searcher(chosen.directory, chosen.model).build(chosen.index).table())
  print(f"next: ernie-jax search {chosen.directory} --index {chosen.index}")


def search(args: Sequence[str]) -> None:
  chosen = parse(Search, "search", args)
  for field in ("k", "depth"):
    if getattr(chosen, field) < 1:
      raise UserError(f"--{field} {getattr(chosen, field)}: must be at least 1")
  if chosen.queries and chosen.query is not None:
    raise UserError(f"--queries {chosen.queries}: is for many queries; leave out {chosen.query!r}")
  if chosen.output and (chosen.output.is_dir() or not chosen.output.resolve().parent.is_dir()):  # now, not after hours
    raise UserError(f"--output {chosen.output}: cannot be a file there; name one in a folder that exists")
  if chosen.output and not chosen.queries:
    raise UserError(f"--output {chosen.output}: is a run of many queries; name them with --queries FILE")
  from ernie_jax import evaluate
  from ernie_jax.search import Searcher

  asked = evaluate.read_queries(chosen.queries) if chosen.queries else {}
  searcher = Searcher(chosen.directory, chosen.model, chosen.index)
  answer = lambda queries: searcher.search(queries, chosen.k, chosen.how, chosen.depth)
  if chosen.output:
    found = searcher.rank(list(asked.values()), chosen.k, chosen.how, chosen.depth)
    evaluate.write_run(searcher.as_run(list(asked), *found), chosen.output, chosen.how)
    print(f"{chosen.output}: {len(asked)} queries\nnext: ernie-jax evaluate QRELS {chosen.output}")
    return
  if asked:
    for query, hits in zip(asked.values(), answer(list(asked.values()))):
      print(query)
      show(hits)
    return
  if chosen.query is not None:
    ask(searcher, chosen, chosen.query)
    return
  print(f"{searcher.about['passages']} passages; an empty line ends")
  with contextlib.suppress(EOFError):
    while query := prompt():
      ask(searcher, chosen, query)


def prompt() -> str:
  try:
    return input("query> ").strip()
  except UnicodeDecodeError as error:
    raise UserError("the query is not UTF-8; set the terminal to it") from error


def ask(searcher: Searcher, chosen: Search, query: str) -> None:
  """Shows one query's hits; for late interaction, with the passage token that each query token matches."""
  hits = searcher.search([query], chosen.k, chosen.how, chosen.depth)[0]
  matched = []
  for hit in hits if chosen.how == "late" else []:
    found = searcher.match(query, hit.row)
    best = found.similarity.argmax(1)
    pairs = [f"{a}>{found.passage[j]} {found.similarity[i, j]:.2f}" for i, (a, j) in enumerate(zip(found.query, best))]
    matched.append("  ".join(pairs))
  show(hits, matched)


def evaluate(args: Sequence[str]) -> None:
  chosen = parse(Evaluate, "evaluate", args)
  folder = chosen.qrels.is_dir()
  if folder and chosen.runs:
    raise UserError(f"evaluate {chosen.qrels}: is a folder, whose rankings are made; leave out {chosen.runs[0]}")
  if not folder and not chosen.runs:
    raise UserError(f"evaluate {chosen.qrels}: name a run to measure: `ernie-jax evaluate QRELS RUN [RUN ...]`")
  if chosen.depth < 1:
    raise UserError(f"--depth {chosen.depth}: must be at least 1")
  from ernie_jax import config, progress
  from ernie_jax import evaluate as measuring

  measures = measuring.parsed(chosen.measures)  # now, not after files of millions of lines
  deepest = max(measure.params.get("cutoff", 1) for measure in measures.values())
  qrels, runs = rankings(chosen, deepest) if folder else (measuring.read_qrels(chosen.qrels), read_runs(chosen))
  found = {}
  for name, run in runs:
    both = len(run.keys() & qrels.keys())
    if not both:
      raise UserError(f"{name}: none of its {len(run):,} queries is judged in {chosen.qrels}; give this run's qrels")
    if both < len(qrels):
      progress.say(f"{name}: lacks {len(qrels) - both:,} of {len(qrels):,} judged queries, they count 0")
    if both < len(run):
      progress.say(f"{name}: {len(run) - both:,} of {len(run):,} queries are not judged, they do not count")
    if chosen.output:
      chosen.output.mkdir(parents=True, exist_ok=True)
      measuring.write_run(run, chosen.output / f"{chosen.split}.{name}.trec", name)
    # What a re-ranker did not read has no rank: nothing deeper is measured.
    deep = chosen.depth if folder and name in ("late", "cross") else deepest
    shown = [name for name, measure in measures.items() if measure.params.get("cutoff", 1) <= deep]
    found[name] = measuring.values(run, qrels, shown)
    del run  # it may take a gigabyte: one at a time
  if chosen.per_query:
    lines = ["\t".join(["query", "run", *chosen.measures])]
    lines += [
      "\t".join([query, name, *(repr(values[m][query]) if m in values else "-" for m in chosen.measures)])
      for query in qrels
      for name, values in found.items()
    ]
    if chosen.per_query == "-":
      print("\n".join(lines))
      return
    config.write(Path(chosen.per_query), "\n".join(lines) + "\n")
  means = [
    [name, *(f"{measuring.mean(values[m]):.4f}" if m in values else "-" for m in chosen.measures)]
    for name, values in found.items()
  ]
  print(measuring.aligned([["", *chosen.measures], *means]))
  (first, base), *others = found.items()
  for name, values in others:
    rows = [[f"{name} - {first}", "difference", "95 % from", "to", "p"]]
    for measure, own in values.items():
      interval = (f"{x:+.4f}" for x in measuring.bootstrap(own, base[measure]))
      rows.append([measure, *interval, f"{measuring.p_value(own, base[measure]):.4f}"])
    print(f"\n{measuring.aligned(rows)}")


def read_runs(chosen: Evaluate) -> Iterator[tuple[str, Run]]:
  """The runs of files, by the file's name."""
  from ernie_jax import evaluate

  for path in chosen.runs:
    yield path.name if [p.name for p in chosen.runs].count(path.name) == 1 else str(path), evaluate.read_run(path)


def rankings(chosen: Evaluate, k: int) -> tuple[Qrels, Iterator[tuple[str, Run]]]:
  """The judgements of an encoded corpus' split, and the rankings of its queries by each system."""
  from ernie_jax import datasets
  from ernie_jax.search import Searcher

  searcher = Searcher(chosen.qrels, chosen.model)
  data = datasets.load(searcher.data)
  queries = data.queries[chosen.split]
  if data.fingerprint != searcher.corpus.about["corpus"]:
    raise UserError(
      f"{chosen.qrels}: holds {searcher.corpus.about['corpus']}, but the data set is {data.fingerprint} now"
    )
  if not len(queries.ids):
    raise UserError(f"--split {chosen.split}: data set {searcher.data.name!r} has no such queries")
  print(f"late and cross re-rank the dual-encoder's {chosen.depth} best of {len(data.corpus.ids)} passages")
  found = searcher.systems(queries.texts[:], max(k, chosen.depth), chosen.depth)
  return data.qrels(chosen.split), ((name, searcher.as_run(queries.ids, *own)) for name, own in found)


def mine(args: Sequence[str]) -> None:
  chosen = parse(Mine, "mine", args)
  from ernie_jax import config, datasets, mesh, mining, tokens
  from ernie_jax.search import Searcher

  settings = config.Mine(chosen.first, chosen.last, chosen.sample, chosen.denoise, chosen.margin)
  searcher = Searcher(chosen.run)
  model = searcher.model
  if settings.judged and not model.crosses:
    raise UserError(f"{chosen.run}: its model has no cross-encoder to judge with; add --margin None")
  data = datasets.load(searcher.data)
  if data.fingerprint != (known := searcher.corpus.about["corpus"]):
    raise UserError(f"{chosen.run}: was made with data set {known}, which is {data.fingerprint} now; run it again")
  if not len(data.queries[chosen.split].ids):
    raise UserError(f"--split {chosen.split}: data set {searcher.data.name!r} has no such queries")
  import jax

  SIGNALS.take(signal.SIGTERM)
  queries, passages = (tokens.store(data, s, model.template.tokenizer, searcher.data) for s in (chosen.split, "corpus"))
  encode = lambda own: model.encode(own, query=True, late=False).vectors
  own = data.queries[chosen.split]
  with jax.set_mesh(mesh.make()):
    found = mining.search(encode, queries, searcher.corpus, own.positives, data.corpus.identity, settings, chosen.seed)
    if settings.judged:
      found = mining.judge(found, model.params, queries, passages, own.positives, model.template, settings)
    result = mining.write(chosen.output, found, own.ids, data.corpus.ids)
  print(f"{chosen.output}: {len(own.ids):,} queries; {mining.summary(result)}")
  if settings.judged:
    print(f"{mining.beside(chosen.output)}: logits of all that the cross-encoder read, known positives among it")
  print(f"next: ernie-jax run CONFIG --mine.last {chosen.last} --mine.margin {chosen.margin} trains on such negatives")


def bring(args: Sequence[str]) -> None:
  chosen = parse(Import, "import", args)
  from ernie_jax import config, hub, pretrained

  config.must_be_new(chosen.output)

  def load(name: str, field: str, *, teacher: bool) -> pretrained.Checkpoint:
    found = pretrained.load(*hub.locate(name, Path(chosen.cache).expanduser(), field), teacher=teacher)
    if chosen.epsilon is not None:
      other = tuple(note for note in found.notes if "epsilon" not in note)
      a = dataclasses.replace(found.architecture, epsilon=chosen.epsilon)
      found = dataclasses.replace(found, architecture=a, notes=other)
    return found

  given = lambda *fields: {f: x for f in fields if (x := getattr(chosen, f)) is not None}
  student = load(chosen.source, "CHECKPOINT", teacher=False).with_layers(chosen.layers, "--layers")
  other = chosen.cross or (chosen.source if student.pair else "")
  cross = load(other, "--cross", teacher=True) if other else None
  settings = student.model | given("pooling", "cosine")
  pooler = cross is not None and (cross.model["teacher_pooler"] if chosen.pooler is None else chosen.pooler)
  model = config.Model(share_encoder=cross is None, **settings | {"teacher_pooler": pooler})
  lengths = student.data | given("query_length", "passage_length")
  # sentence-transformers' length is often all positions, of which a pair needs some for the query.
  most = student.architecture.positions - lengths.get("query_length", Data.query_length) + 1
  if chosen.passage_length is None and lengths.get("passage_length", 0) > most >= 4:
    lengths["passage_length"] = most
  data = Data(**lengths)
  random = pretrained.adopt(student, cross, model, data, chosen.output)
  for own in (student, cross):
    if own is not None:
      a = own.architecture
      print(f"{own.source}: {a.layers} layers, width {a.width}, vocabulary {a.vocabulary}, epsilon {a.epsilon:g}")
      for note in own.notes:
        print(f"  {note}")
  assumed = "" if settings.keys() >= {"pooling", "cosine"} else " (assumed: --pooling and --cosine say otherwise)"
  print(f"vectors: pooling {model.pooling}, {'cosine' if model.cosine else 'dot product'}{assumed}")
  print(f"texts: queries of {data.query_length} tokens, passages of {data.passage_length}, template {data.template}")
  if random:
    print(f"random, for no checkpoint brings it: {', '.join(random)}")
  print(f"next: ernie-jax encode {chosen.output} NAME --from DIR, or --model.start {chosen.output}")


def export(args: Sequence[str]) -> None:
  chosen = parse(Export, "export", args)
  from ernie_jax import export as layouts

  layouts.export(chosen.run, chosen.to, chosen.output)
  print(f"{chosen.output}: {chosen.to}; README.md says how to load it")


def plan(args: Sequence[str]) -> None:
  named, settings = named_config(args, "plan", "configs/msmarco.py --topology v5e:16x16")
  chosen = parse(Plan, "plan CONFIG", args[named:], Plan(settings))
  from ernie_jax import plan as planning

  if chosen.tokens and min(chosen.tokens) < 3:
    raise UserError(f"--tokens {chosen.tokens}: a text has 3 tokens at least: [CLS], a word, [SEP]")
  if chosen.tokens and chosen.config.data.pack is None:
    raise UserError(f"--tokens {chosen.tokens}: tells how many packed rows there are; set --data.pack too")
  texts = planning.typical(*chosen.tokens) if chosen.tokens else None
  if chosen.sweep:
    for line in planning.sweep(chosen.config, chosen.stage, chosen.topology, texts):
      print(line, flush=True)
    return
  print(planning.table(planning.plan(chosen.config, chosen.stage, chosen.topology, texts)))


def report(args: Sequence[str]) -> None:
  chosen = parse(Report, "report", args)
  if not chosen.runs:
    raise UserError("report: name a finished run: `ernie-jax report RUN [RUN ...]`")
  output = chosen.output
  if output and (output.is_dir() or not output.resolve().parent.is_dir()):
    raise UserError(f"--output {output}: cannot be a file there; name one in a folder that exists")
  from ernie_jax import report as pages

  if len(chosen.runs) == 1:
    print(pages.write_report(chosen.runs[0], output))
  else:
    print(pages.write_comparison(chosen.runs, output or Path("report.html")))


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
    searcher = Searcher(chosen.directory, chosen.model, chosen.index)
    service.warm(searcher)
    progress.silence()  # each request would say what it encodes
    api = service.app(searcher, service.names(chosen.host), service.examples(searcher))
    SIGNALS.take(signal.SIGTERM)
    print(f"{searcher.about['passages']:,} passages at {service.address(chosen.host, own)}", flush=True)
    service.server(api).run([own])


def show(hits: Sequence[Hit], matched: Sequence[str] = ()) -> None:
  for rank, hit in enumerate(hits, 1):
    print(f"{rank:3d}  {hit.score:6.3f}  {hit.title}\n             {shorten(hit.text, 160)}")
    if matched:
      print(f"             {matched[rank - 1]}")


VERBS = {
  "run": run,
  "encode": encode,
  "index": index,
  "search": search,
  "evaluate": evaluate,
  "serve": serve,
  "mine": mine,
  "data": data,
  "import": bring,
  "export": export,
  "ablate": ablate,
  "report": report,
  "plan": plan,
}
