"""Retrieval data that every machine with Python has: the docstrings of its installed packages.

A query is a docstring's summary line; its passage is the public qualified name and the rest of the docstring.
Source files are read with `ast`; no package is imported. In order: find the files, parse them, name what they
define as a user would import it, clean, collapse near-duplicates, split.
"""

from __future__ import annotations

import ast
import dataclasses
import gc
import hashlib
import importlib.metadata
import inspect
import itertools
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ernie_jax.config import Data, UserError
from ernie_jax.datasets import RetrievalBuilder, Row, Rows
from ernie_jax.datasets.files import Bad
from ernie_jax.progress import say

CLEANING = 2  # raise it whenever a change below changes the rows: prepared data sets are then made anew

SUMMARY_WORDS = (4, 40)  # fewest and most words of a query
BODY_WORDS = 12  # fewest words of a passage
MOST_BODIES = 8  # a summary of more bodies than this is boilerplate
JACCARD = 0.7  # bodies this close are one passage
TEST, DEV = 0.10, 0.05  # shares of the queries

# -------------------------------------------------------------------------------- files

NO_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}


class Source(NamedTuple):
  """A file and the module that it is: `numpy/linalg/__init__.py`, `numpy.linalg`, True."""

  path: Path
  module: str
  package: bool


def version(package: str) -> str:
  """The installed version of a distribution, "python" being Python itself; a `UserError` if there is none."""
  if package == "python":
    return platform.python_version()
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    raise UserError(
      f"data.packages: {package!r} is not installed: `pip install {package}`, or drop it from data.packages"
    ) from None


def sources(package: str) -> list[Source]:
  """The Python files of a distribution (or of the standard library for "python") without its tests, sorted.

  Raises a `UserError` if the package is not installed or brings no Python files.
  """
  version(package)
  if package == "python":
    root = Path(sysconfig.get_path("stdlib"))
    files = [(root, path.relative_to(root)) for path in root.rglob("*.py")]
  else:
    distribution = importlib.metadata.distribution(package)
    root = Path(str(distribution.locate_file("")))
    files = [(root, Path(str(file))) for file in distribution.files or () if file.suffix == ".py"]
  found = sorted(Source(root / file, *module_of(file)) for root, file in files if wanted(file))
  if not found:
    raise UserError(
      f"data.packages: {package!r} lists no Python files (an editable install does not): install it whole"
    )
  return found


def tree(root: Path) -> list[Source]:
  """The Python files below a folder, which holds top-level modules and packages, without tests, sorted."""
  files = (path.relative_to(root) for path in root.rglob("*.py"))
  return sorted(Source(root / file, *module_of(file)) for file in files if wanted(file))


def wanted(file: Path) -> bool:
  """Whether a file, relative to its import root, is an importable module and no test."""
  *folders, name = file.with_suffix("").parts
  return (
    not NO_SOURCES & {*folders, name}
    and all(part.isidentifier() for part in (*folders, name))
    and not name.startswith("test_")
    and name not in ("conftest", "__main__")
  )


def module_of(file: Path) -> tuple[str, bool]:
  """`numpy/linalg/__init__.py` -> ("numpy.linalg", True)"""
  parts = file.with_suffix("").parts
  package = parts[-1] == "__init__"
  return ".".join(parts[:-1] if package else parts), package


# -------------------------------------------------------------------------------- parsing


@dataclasses.dataclass
class Module:
  """What one file says: its docstrings by path within the module, and what it takes from other modules."""

  name: str
  package: bool
  docs: dict[tuple[str, ...], str] = dataclasses.field(default_factory=dict)  # () is the module itself
  defined: set[str] = dataclasses.field(default_factory=set)  # top-level classes and functions
  classes: set[str] = dataclasses.field(default_factory=set)  # those of them that are classes
  imported: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)  # name -> (module, name there)
  offered: set[str] = dataclasses.field(default_factory=set)  # imported in order to be re-exported
  stars: list[str] = dataclasses.field(default_factory=list)  # from ... import *
  exported: set[str] | None = None  # __all__, as far as it is written out
  added: list[tuple[str | None, tuple[str, ...], str]] = dataclasses.field(default_factory=list)  # add_newdoc


def parse(files: Iterable[Source]) -> tuple[list[Module], int]:
  """The modules in the order of their files, and how many files were skipped because they do not parse."""
  modules, skipped = [], 0
  collecting = gc.isenabled()
  gc.disable()  # syntax trees are many small objects without cycles: a third of the time would be collection
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # invalid escapes in other people's strings
      for path, name, package in files:
        try:
          # Bytes, not text: the parser honours a file's own encoding line.
          body = ast.parse(path.read_bytes()).body
          module = Module(name, package)
          _visit(module, body, ())
        except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
          skipped += 1
        else:
          modules.append(module)
  finally:
    if collecting:
      gc.enable()
  return modules, skipped


def _visit(module: Module, body: list[ast.stmt], outer: tuple[str, ...], head: bool = True) -> None:
  """Collects what the statements of a module, of a class, or of an `if` or `try` within one say."""
  if head and body and (text := _string(body[0])) is not None:
    module.docs.setdefault(outer, text)
  for node in body:
    match node:
      case ast.ClassDef(name=name, body=inner):
        if not outer:
          module.defined.add(name)
          module.classes.add(name)
        _visit(module, inner, (*outer, name))
      case ast.FunctionDef(name=name, body=inner) | ast.AsyncFunctionDef(name=name, body=inner):
        # What a function defines within itself has no public name: its body is not entered.
        if not outer:
          module.defined.add(name)
        if (text := _string(inner[0])) is not None:
          module.docs.setdefault((*outer, name), text)
      case ast.If(body=inner, orelse=other) | ast.For(body=inner, orelse=other) | ast.While(body=inner, orelse=other):
        _visit(module, inner, outer, False)
        _visit(module, other, outer, False)
      case ast.With(body=inner):
        _visit(module, inner, outer, False)
      case ast.Try(body=inner, handlers=handlers, orelse=other, finalbody=last):
        for part in (inner, other, *(handler.body for handler in handlers), last):
          _visit(module, part, outer, False)
      case ast.ImportFrom() if not outer:
        _visit_import(module, node)
      case (
        ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=names) | ast.Tuple(elts=names))
        | ast.AugAssign(target=ast.Name(id="__all__"), value=ast.List(elts=names) | ast.Tuple(elts=names))
      ) if not outer:
        module.exported = (module.exported or set()) | {text for each in names if (text := _string(each)) is not None}
      case ast.Assign(targets=[ast.Name(id=name)], value=value) if not outer:
        # `pad = _pad` and `norm = norm_gen(...)`: known by the new name if that is the one re-exported.
        instance = isinstance(value, ast.Call)
        origin = value.func if isinstance(value, ast.Call) else value
        if isinstance(origin, ast.Name) and origin.id in (module.classes if instance else module.defined):
          module.imported.setdefault(name, (module.name, origin.id))
      case ast.Expr(value=ast.Call() as call):
        module.added += _newdocs(call)


def _visit_import(module: Module, node: ast.ImportFrom) -> None:
  base = node.module or ""
  if node.level:
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + module.package]
    base = ".".join((*parts, base) if base else parts)
  for alias in node.names:
    if alias.name == "*":
      module.stars.append(base)
    else:
      name = alias.asname or alias.name
      module.imported.setdefault(name, (base, alias.name))
      if module.package or alias.asname == alias.name:  # `import x as x` says that x is offered
        module.offered.add(name)


def _string(node: ast.AST) -> str | None:
  """The string that a statement or expression is, if it is one."""
  value = node.value if isinstance(node, ast.Expr) else node
  return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def _newdocs(call: ast.Call) -> Iterator[tuple[str | None, tuple[str, ...], str]]:
  """(module, path, docstring) of `add_newdoc("numpy", "ndarray", doc)`, `(..., ("base", doc))`, `(..., [])`.

  scipy.special's own form `add_newdoc("gamma", doc)` has no module (None): it means its file's package.
  """
  name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
  if name != "add_newdoc":
    return
  match [_string(arg) for arg in call.args], call.args[-1:]:
    case [str(place), str(thing), str(text)], _:
      yield place, tuple(thing.split(".")), text
    case [str(place), str(thing), None], [ast.Tuple(elts=[member, docs])]:
      yield from _members(place, thing, [(member, docs)])
    case [str(place), str(thing), None], [ast.List(elts=members)]:
      pairs = [tuple(pair.elts) for pair in members if isinstance(pair, ast.Tuple) and len(pair.elts) == 2]
      yield from _members(place, thing, pairs)
    case [str(thing), str(text)], _:
      yield None, tuple(thing.split(".")), text


def _members(place: str, thing: str, pairs: list) -> Iterator[tuple[str, tuple[str, ...], str]]:
  for member, docs in pairs:
    name, text = _string(member), _string(docs)
    if name is not None and text is not None:
      yield place, (*thing.split("."), name), text


# -------------------------------------------------------------------------------- public names


def public(*parts: str) -> bool:
  """Whether no component of these (dotted) names begins with an underscore."""
  return not any(part.startswith("_") for name in parts for part in name.split("."))


class Doc(NamedTuple):
  """A docstring under the public name of what it describes."""

  name: str
  text: str


def name_docs(modules: list[Module]) -> list[Doc]:
  """Every docstring of something with a public name, once, in the order of the modules.

  `numpy/lib/_arraypad_impl.py` defines `pad`; `numpy/__init__.py` imports it: its name is `numpy.pad`. So
  imports are followed, but only those that re-export: in a package's `__init__.py`, through `*`, through
  `__all__` or as `import x as x`. A definition in a public module keeps its place, unless a package that
  holds the module re-exports it. What no public module offers is left out.
  """
  table: dict[str, Module] = {}
  for module in modules:
    table.setdefault(module.name, module)
  _place_newdocs(table)
  names = _aliases(table)
  found: dict[str, str] = {}
  for module in table.values():
    for path, text in module.docs.items():
      if path:
        top = names.get((module.name, path[0])) or f"{module.name}.{path[0]}"
        name = ".".join((top, *path[1:]))
      else:
        name = module.name
      if public(name):
        found.setdefault(name, text)
  return [Doc(name, text) for name, text in found.items()]


def _place_newdocs(table: dict[str, Module]) -> None:
  """Puts the docstrings of `add_newdoc` where they belong, as if the C code of that module were Python."""
  for module in list(table.values()):
    for place, path, text in module.added:
      home = place or module.name.rpartition(".")[0]
      target = table.get(home)
      if target is None:
        target = table[home] = Module(home, False)
      target.docs.setdefault(path, text)
      if path[0] not in target.imported:
        target.defined.add(path[0])


def _aliases(table: dict[str, Module]) -> dict[tuple[str, str], str]:
  """(module, name) of a definition -> the public name it is best known by, if that is not its own place."""

  def bound(module: Module, seen: frozenset[str] = frozenset()) -> set[str]:
    """Names that `from module import *` brings."""
    if module.exported is not None:
      return module.exported
    names = module.defined | module.imported.keys()
    for star in module.stars:
      if star in table and star not in seen:
        names = names | bound(table[star], seen | {module.name})
    return {name for name in names if not name.startswith("_")}

  starred: dict[str, dict[str, str]] = {}

  def home(place: str, name: str, depth: int = 0) -> tuple[str, str] | None:
    """Where a name of a module is defined, imports followed."""
    module = table.get(place)
    if module is None or depth > 20:
      return None
    if name in module.defined:
      return place, name
    if name in module.imported:
      return home(*module.imported[name], depth + 1)
    if place not in starred:
      starred[place] = {each: star for star in reversed(module.stars) if star in table for each in bound(table[star])}
    return home(starred[place][name], name, depth + 1) if name in starred[place] else None

  # The shortest name wins, and of two equally short ones that under which it was defined.
  best: dict[tuple[str, str], tuple[int, bool, str]] = {}
  for module in table.values():
    if not public(module.name):
      continue
    names = set(module.offered)
    for star in module.stars:
      if star in table:
        names |= bound(table[star])
    names |= {name for name in module.exported or () if name not in module.defined}
    for name in names:
      if not public(name) or name in module.defined:
        continue
      origin = home(module.name, name)
      if origin is None or (public(*origin) and not origin[0].startswith(module.name + ".")):
        continue
      rank = (module.name.count("."), name != origin[1], f"{module.name}.{name}")
      best[origin] = min(best.get(origin, rank), rank)
  return {origin: name for origin, (*_, name) in best.items()}


# -------------------------------------------------------------------------------- cleaning

SIGNATURE = re.compile(r"^[\w.]+\s?\(.*\)(\s*(->|=).*)?(\n--)?$", re.DOTALL)
SENTENCE = re.compile(r"(?<=[\w)][.!?])\s+(?=[A-Z])")
LINK = re.compile(r"\s*<https?://[^>]*>|(?<=\])\(https?://[^)]*\)")
UNDERLINE = re.compile(r"^\s*([-=~^*`#\"'+])\1{2,}\s*$", re.MULTILINE)
DOCTEST = re.compile(r"^[ \t]*>>>.*(?:\n(?![ \t]*$).*)*", re.MULTILINE)
FENCED = re.compile(r"^([ \t]*)```.*?^\1```[ \t]*$", re.MULTILINE | re.DOTALL)
LITERAL = re.compile(  # a line that ends in "::", and the deeper lines below it
  r"^([ \t]*)(\S.*)?::[ \t]*\n(?:[ \t]*\n)*(?:\1[ \t]+\S.*(?:\n|\Z)(?:[ \t]*\n)*)+", re.MULTILINE
)
DIRECTIVE = re.compile(r"^[ \t]*\.\.[ \t].*$", re.MULTILINE)  # link targets and comments as well
ROLE = re.compile(r":[a-zA-Z][\w:+-]*:`~?\.?([^`<]*?)(?:\s*<[^`]*>)?`")
TICKS = re.compile(r"`+([^`]*)`+_{0,2}")
STARS = re.compile(r"(?<!\w)(\*{1,2})(?=\w)([^*\n]*\w)\1(?!\w)")
# "x (int): the number", "x: int, the number", "x : array", ":param x:", "- item", "@tag": no sentences.
ITEM = re.compile(r"^(\w+\s*\([^)]*\)\s*:|\w+\s+:\s|\w+:\s|[:@>$#\-*+|.])")
# Notes to the maintainers of the code, which nobody would search for.
NOTE = re.compile(r"^(todo|fixme|xxx|see|deprecated|private|internal|copyright|alias (of|for)|same as|like)\b", re.I)
OTHER = re.compile(r"https?://|[{}<>=|\\]{2}|[%{]\w")


def clean(text: str) -> str:
  """Markup off, whitespace to single spaces: what is left is the prose as a reader sees it."""
  text = ROLE.sub(r"\1", LINK.sub("", text))
  text = TICKS.sub(r"\1", text)
  text = STARS.sub(r"\2", text)
  return " ".join(text.encode("utf-8", "ignore").decode().split())


def divide(text: str) -> tuple[str, str]:
  """A docstring's summary (its first paragraph, as one line) and the rest, both cleaned.

  Of a paragraph that is too long, or that leads over to a list, only the first sentence is the summary.
  Signatures that stand before the summary, code, directives and rules under headings are left out.
  """
  paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text.expandtabs()).strip())
  while len(paragraphs) > 1 and (SIGNATURE.match(paragraphs[0]) or paragraphs[0].strip() == "--"):
    paragraphs.pop(0)
  rest = "\n\n".join(paragraphs[1:])
  rest = LITERAL.sub(lambda match: f"{match[2]}.\n\n" if match[2] and not match[2].startswith("..") else "\n", rest)
  for part in (FENCED, DOCTEST, DIRECTIVE, UNDERLINE):
    rest = part.sub("", rest)
  summary, body = clean(UNDERLINE.sub("", paragraphs[0])), clean(rest)
  if len(summary.split()) > SUMMARY_WORDS[1] or summary.endswith(":"):
    summary, *more = SENTENCE.split(summary, maxsplit=1)
    body = " ".join((*more, body))
  return summary, body


def prose(text: str) -> bool:
  """Whether a text is mostly English words: ASCII, and more letters than anything else."""
  letters = sum(map(str.isalpha, text))
  return len(text.encode()) <= 1.02 * len(text) and letters >= 0.7 * (len(text) - text.count(" "))


def is_query(summary: str) -> bool:
  """Whether a person could have typed this summary into a search box."""
  fewest, most = SUMMARY_WORDS
  return (
    fewest <= len(summary.split()) <= most
    and not summary.endswith(":")
    and not ITEM.match(summary)
    and not NOTE.match(summary)
    and not OTHER.search(summary)
    and prose(summary)
  )


def is_passage(body: str) -> bool:
  """Whether a docstring's rest says enough to be found by."""
  return len(body.split()) >= BODY_WORDS and len(body.encode()) <= 1.05 * len(body)


def normalise(summary: str) -> str:
  """A query's identity: its words, lower-case, without punctuation."""
  return " ".join(re.findall(r"[a-z0-9_]+", summary.lower()))


def split_of(normalised: str) -> str:
  """train, dev or test, by a hash of the normalised summary: the same on every machine, in every version."""
  share = int(hashlib.sha256(normalised.encode()).hexdigest()[:8], 16) / 2**32
  return "test" if share < TEST else "dev" if share < TEST + DEV else "train"


# -------------------------------------------------------------------------------- near-duplicates


def collapse(bodies: list[str]) -> list[int]:
  """For every body, the index of the body that stands for it: its own, or that of an earlier near-duplicate.

  Two bodies are near-duplicates if the sets of their words, two at a time, overlap by `JACCARD` or more.
  Minhash finds the candidates, the exact overlap decides.
  """
  import datasketch

  permutations = 64
  sets = [_shingles(body) for body in bodies]
  sketches = datasketch.MinHash.generator(map(sorted, sets), num_perm=permutations, seed=1)
  index = datasketch.MinHashLSH(JACCARD, permutations)
  result: list[int] = []
  for i, sketch in enumerate(sketches):
    overlap = {j: len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for j in index.query(sketch)}
    near = max(overlap, key=lambda j: (overlap[j], -j), default=i)
    if near != i and overlap[near] >= JACCARD:
      result.append(near)
    else:
      index.insert(i, sketch)
      result.append(i)
  return result


def _shingles(body: str) -> set[bytes]:
  words = [word.encode() for word in body.lower().split()]
  return {first + b" " + second for first, second in itertools.pairwise(words)} or set(words)


# -------------------------------------------------------------------------------- rows


def make_rows(docs: Iterable[Doc]) -> Rows:
  """Corpus and queries of train, dev and test.

  The corpus holds the passages with a usable summary. Equal normalised summaries are one query.
  """
  entries: list[tuple[str, str, str]] = []
  bodies_of: dict[str, set[str]] = {}
  for doc in docs:
    summary, body = divide(doc.text)
    if is_query(summary) and is_passage(body):
      entries.append((doc.name, summary, body))
      bodies_of.setdefault(normalise(summary), set()).add(body)
  entries = [entry for entry in entries if len(bodies_of[normalise(entry[1])]) <= MOST_BODIES]
  stands = collapse([body for _, _, body in entries])
  corpus = [Row(name, name, body) for i, (name, _, body) in enumerate(entries) if stands[i] == i]
  queries: dict[str, tuple[str, list[str]]] = {}
  for i, (_, summary, _) in enumerate(entries):
    positives = queries.setdefault(normalise(summary), (summary, []))[1]
    if (positive := entries[stands[i]][0]) not in positives:
      positives.append(positive)
  rows: dict[str, list[Row]] = {"corpus": corpus, "train": [], "dev": [], "test": []}
  for key, (summary, positives) in queries.items():
    rows[split_of(key)].append(Row(hashlib.sha256(key.encode()).hexdigest()[:12], "", summary, tuple(positives)))
  return dict(rows)


# -------------------------------------------------------------------------------- the builder


class Docstrings(RetrievalBuilder):
  """The docstrings of the packages in `data.packages`."""

  def rows(self, bad: Bad) -> Rows:
    packages = tuple(dict.fromkeys(self.data.packages))
    files = [file for package in packages for file in sources(package)]
    modules, skipped = parse(files)
    say(f"  docstrings: {len(modules)} files parsed, {skipped} skipped")
    docs = name_docs(modules)
    rows = {split: list(rows) for split, rows in make_rows(docs).items()}
    sizes = ", ".join(f"{len(rows[split])} {split}" for split in ("train", "dev", "test"))
    say(f"  docstrings: {len(docs)} with public names, {len(rows['corpus'])} passages; queries: {sizes}")
    if not rows["corpus"]:
      raise UserError(f"data.packages={packages!r}: no usable docstrings: add a package")
    return dict(rows)


def builder(data: Data, directory: Path) -> RetrievalBuilder:
  """The builder for `data.packages`, with its files below `directory`.

  Its configuration is named after the installed versions, so an upgrade makes a new data set. Raises a
  `UserError` if a package is not installed.
  """
  versions = [f"{package} {version(package)}" for package in dict.fromkeys(data.packages)]
  # Minhash proposes which bodies are compared, and how it does may change with its version.
  parts = [f"cleaning {CLEANING}", f"datasketch {version('datasketch')}", *versions]
  name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
  return Docstrings.make(data, directory, name, ", ".join(versions))
