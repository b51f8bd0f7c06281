"""Plans a training stage on a TPU slice, on a machine without a TPU: compiles the real step, and reads the compiler.

Everything here is an estimate. Memory is what the compiler allocates. Time is the sum of its own `estimated_cycles`
over the clock, plus a model of the collectives, as if nothing overlapped. Arrays exist only as shapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ernie_jax import batches, columns, config, cost, mesh, scores, step
from ernie_jax.config import Config, Stage, UserError, check, first_line
from ernie_jax.cost import GIB
from ernie_jax.encoder import Rows
from ernie_jax.progress import clock, say
from ernie_jax.tokens import Tokenizer


class Family(NamedTuple):
  """TPUs of one kind: their chip, clock in Hz, longest side of a slice, and slices of 16, 32, 64, 128, 256 chips."""

  chip: cost.Chip
  hertz: float
  longest: int
  slices: tuple[str, ...]


# The clock is not published for all: it is the peak over what a cycle does, 4 matrix units of 128 x 128 in v5e, 8 in
# v5p, 4 of 256 x 256 in v6e (docs.cloud.google.com/tpu). By libtpu 0.0.42's cycles, a product of bfloat16 matrices
# of 16384 x 16384 then runs at 92, 94 and 78 % of the peak.
FLAT = ("4x4", "4x8", "8x8", "8x16", "16x16")
FAMILIES = {
  "v5e": Family(cost.V5E, 1.5e9, 16, FLAT),
  "v5p": Family(cost.V5P, 1.75e9, 28, ("2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")),
  "v6e": Family(cost.V6E, 1.75e9, 16, FLAT),
}
GOOD = "v5e:4x4, v5e:16x16, v6e:8x8 or v5p:4x4x4"


class Collective(NamedTuple):
  """One communication operation of the compiled step; bytes are those of the whole result, or of what is reduced."""

  kind: str
  bytes: int
  times: int  # a step


class Operation(NamedTuple):
  """What the compiler made of one source line."""

  where: str  # file:line
  name: str  # of its dearest operation, as jax calls it
  cycles: int  # a step, of all its operations


class DoesNotFit(UserError):
  """The compiler found no place in a chip's memory."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the compiler says of one stage's step on one slice."""

  stage: str
  topology: str
  chips: int
  train: config.Train
  memory: dict[str, float]  # bytes on each chip, by what they hold
  flops: float  # model FLOPs of a step, all chips
  cycles: int  # of each chip
  collectives: list[Collective]
  operations: list[Operation]  # of each chip, the dearest source line first

  @property
  def family(self) -> Family:
    return FAMILIES[self.topology.split(":")[0]]

  @property
  def computing(self) -> float:
    """Seconds."""
    return self.cycles / self.family.hertz

  @property
  def communicating(self) -> float:
    """Seconds."""
    return sum(seconds(c, self.chips, self.family.chip.interconnect) for c in self.collectives)

  @property
  def step_time(self) -> float:
    """Seconds, as if nothing overlapped."""
    return self.computing + self.communicating

  @property
  def mfu(self) -> float:
    return self.flops / (self.step_time * self.chips * self.family.chip.flops)

  @property
  def rate(self) -> float:
    """Queries a second."""
    return self.train.batch / self.step_time


def seconds(collective: Collective, chips: int, bandwidth: float) -> float:
  """Modelled time of a collective over all chips: a ring that fills all of a chip's links.

  Each chip sends (n - 1)/n of the bytes, twice for an all-reduce (reduce-scatter, then all-gather), once all of them
  for a permutation. Latency is left out; so is that a slice smaller than a pod has no wrap-around links.
  """
  share = 1.0 if collective.kind == "collective-permute" else (chips - 1) / chips
  return collective.times * collective.bytes * share * (2 if collective.kind == "all-reduce" else 1) / bandwidth


# --- reading compiled HLO text


COLLECTIVE = re.compile(
  r"= (?P<shape>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\("
)
WIDTH = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2}  # bytes of an element; others say their bits: f32, s8, f8e4m3fn


def size(shape: str) -> int:
  """Bytes of an HLO shape, such as `(f32[8,4]{1,0}, bf16[2])`, without padding."""
  total = 0.0
  for kind, dims in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", shape):
    width = WIDTH.get(kind) or int(re.findall(r"\d+", kind)[0]) / 8
    total += width * math.prod(int(d) for d in dims.split(",") if d)
  return int(total)


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
  """Compiled text -> (lines of each computation, the name of the entry)."""
  found: dict[str, list[str]] = {}
  entry = name = ""
  for line in hlo.splitlines():
    if head := re.match(r"(ENTRY )?%?([\w.\-]+)\s*\(.*->.*\{", line):
      name = head.group(2)
      found[name] = []
      entry = name if head.group(1) else entry
    elif line.startswith("}"):
      name = ""
    elif name:
      found[name].append(line)
  return found, entry


def trips(loop: str, condition: list[str]) -> int:
  """How often a loop turns: what the compiler knows, or else the bound that its condition compares with."""
  if known := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop):
    return int(known.group(1))
  return max((int(n) for line in condition for n in re.findall(r"constant\((\d+)\)", line)), default=1)


def branches(line: str) -> list[str]:
  """The computations of which a condition runs one."""
  names = re.findall(r"(?:true_computation|false_computation)=%?([\w.\-]+)", line)
  return names + [n.strip(" %") for g in re.findall(r"branch_computations=\{([^}]*)\}", line) for n in g.split(",")]


def walk(found: dict[str, list[str]], name: str, times: int = 1) -> Iterator[tuple[str, int]]:
  """(line, how often it runs) from a computation on; of a condition's branches, the dearest."""
  for line in found[name]:
    yield line, times
    if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
      yield from walk(found, loop.group(2), times * trips(line, found[loop.group(1)]))
    elif " conditional(" in line:
      yield from walk(found, max(branches(line), key=lambda n: total_cycles(found, n)), times)
    elif called := re.search(r"(?: call\(.*to_apply|calls)=%?([\w.\-]+)", line):
      yield from walk(found, called.group(1), times)


def scheduled(found: dict[str, list[str]], name: str) -> Iterator[tuple[str, int]]:
  """(line, cycles) from a computation on: the compiler writes its estimate where an operation is scheduled."""
  for line, times in walk(found, name):
    if cycles := re.search(r'estimated_cycles"?:\s*"?(\d+)', line):
      yield line, times * int(cycles.group(1))


def total_cycles(found: dict[str, list[str]], name: str) -> int:
  """The compiler's estimated cycles from a computation on."""
  return sum(cycles for _, cycles in scheduled(found, name))


HERE = os.path.dirname(__file__)


def sources(hlo: str) -> dict[str, str]:
  """{stack frame: file:line}: the innermost line of this package in it, or of any where there is none."""
  table: dict[str, dict[str, str]] = {}
  for part, lines in re.findall(r"^(FileNames|FileLocations|StackFrames)\n((?:\d+ .*\n)*)", hlo, re.MULTILINE):
    table[part] = dict(line.split(" ", 1) for line in lines.splitlines())
  number = lambda field, text: re.findall(rf"{field}=(\d+)", text)[0]
  names = {place: name.strip('"') for place, name in table.get("FileNames", {}).items()}
  places = {
    place: (names[number("file_name_id", text)], number(r"\bline", text))
    for place, text in table.get("FileLocations", {}).items()
  }
  frames = {
    frame: (number("file_location_id", text), number("parent_frame_id", text))
    for frame, text in table.get("StackFrames", {}).items()
  }

  def where(frame: str) -> str:
    innermost, last = places[frames[frame][0]], ""
    while frame in frames and frame != last:  # the outermost is its own parent
      file, line = places[frames[frame][0]]
      if file.startswith(HERE):
        return f"{os.path.relpath(file, HERE)}:{line}"
      last, frame = frame, frames[frame][1]
    return f"{os.path.basename(innermost[0])}:{innermost[1]}"

  return {frame: where(frame) for frame in frames}


def operations(found: dict[str, list[str]], name: str, known: dict[str, str]) -> list[Operation]:
  """Cycles by source line from a computation on, the dearest first; `known` are the lines, as of `sources`.

  A fusion of several lines' work counts where its result comes from.
  """
  cycles: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
  for line, amount in scheduled(found, name):
    frame, called = (re.search(pattern, line) for pattern in (r"stack_frame_id=(\d+)", r'op_name="([^"]*)"'))
    where = known.get(frame.group(1), "") if frame else ""
    kind = re.search(r"%?([a-zA-Z\-_]+)[\w.]* = ", line)
    cycles[where or "the compiler"][called.group(1) if called else kind.group(1) if kind else "?"] += amount
  lines = [Operation(where, max(own, key=lambda n: own[n]), sum(own.values())) for where, own in cycles.items()]
  return sorted(lines, key=lambda operation: -operation.cycles)


def collectives(found: dict[str, list[str]], name: str, chips: int) -> list[Collective]:
  """Every collective from a computation on.

  One that runs beside other work is written into many fusions, in parts of the same channel: it counts once, as often
  as its rarest part.
  """
  # A TPU's way to scatter: an operation of that name, in which all is reduced and a part taken.
  scattered = {line for part, lines in found.items() if part.startswith("all-reduce-scatter") for line in lines}
  plain: list[Collective] = []
  parts: dict[tuple[str, str], Collective] = {}
  for line, times in walk(found, name):
    if not (hit := COLLECTIVE.search(line)):
      continue
    kind, amount = hit["kind"], size(hit["shape"])
    if hit["start"] and kind == "collective-permute":  # (operand, result)
      amount //= 2
    elif hit["start"] and kind in ("all-gather", "reduce-scatter"):  # (operand, result): one has n times the other
      amount = amount * chips // (chips + 1)
    elif kind == "reduce-scatter":  # the result is one part
      amount *= chips
    if line in scattered:
      kind = "reduce-scatter"
    here = Collective(kind, amount, times)
    if '"async_collective_fusion_config"' in line and (channel := re.search(r"channel_id=(\d+)", line)):
      other = parts.setdefault((kind, channel.group(1)), here)
      parts[kind, channel.group(1)] = min(here, other, key=lambda c: c.times)
    else:
      plain.append(here)
  return plain + list(parts.values())


def out_of_memory(message: str) -> tuple[float, float] | None:
  """(needed, available) bytes of a chip's memory from the compiler's error; None if it says something else."""
  amount = r"([\d.]+)([KMGT]?)"
  hit = re.search(rf"Used {amount} of {amount} hbm", message)
  hit = hit or re.search(rf"\({amount}\) exceeds available HBM \({amount}\)", message)
  if hit is None:
    return None
  unit = lambda letter: 1024 ** " KMGT".index(letter or " ")
  return float(hit.group(1)) * unit(hit.group(2)), float(hit.group(3)) * unit(hit.group(4))


# --- compiling the step


def slice_of(topology: str) -> int:
  """Chips of a slice's name, such as v5e:4x4; `UserError` for names that no TPU has."""
  family, _, sides = topology.partition(":")
  known = FAMILIES.get(family)
  dims = [int(d) for d in sides.split("x")] if re.fullmatch(r"\d+(x\d+)*", sides) else []
  good = False
  if known is not None and len(dims) == known.slices[0].count("x") + 1:
    good = min(dims) > 0 and max(dims) <= known.longest and dims[0] % 2 == dims[1] % 2 == 0  # hosts hold 2 x 2 chips
  check(good, "--topology", topology, f"no such slice; good ones are {GOOD}")
  return math.prod(dims)


def devices(topology: str) -> list[Any]:
  """The slice's devices, as the compiler knows them."""
  slice_of(topology)
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("plan: the TPU compiler is not installed; pip install -e .[tpu]")
  # The compiler is asked and no TPU is looked for, so several may run at once. libtpu reads these when it is loaded.
  jax.config.update("jax_platforms", "cpu")
  os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5e-256", "TPU_WORKER_HOSTNAMES": "localhost"}
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  try:
    return list(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)
  except Exception as error:  # libtpu's own errors have no common type
    raise UserError(f"--topology={topology!r}: {first_line(error)}; good ones are {GOOD}") from error


def architectures(model: config.Model) -> tuple[config.Architecture, config.Architecture]:
  """The shapes of student and teacher; a checkpoint's must stand in the configuration too, for none is read here."""
  student, teacher = model.scratch, model.teacher_scratch
  check(
    not model.start or student != config.Architecture(),
    "model.start",
    model.start,
    "a plan reads no checkpoint; give its shape as model.scratch",
  )
  check(
    not model.teacher_start or teacher is not None,
    "model.teacher_start",
    model.teacher_start,
    "a plan reads no checkpoint; give its shape as model.teacher_scratch",
  )
  if teacher is None or model.share_encoder or (model.start and not model.teacher_start):
    return student, student  # so does a run: the student's checkpoint starts both
  return student, teacher


def arguments(
  settings: Config, train: config.Train, over: Mesh, layout: batches.Layout | None = None
) -> tuple[step.State, scores.Batch, jax.ShapeDtypeStruct]:
  """The step's arguments as shapes with shardings: no array is made. Call it under the mesh."""

  def placed(x, spec):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(over, spec))

  def make(key):
    shapes = architectures(settings.model)
    params = step.init_params(settings.model, *shapes, key)
    if train.on.mlm:
      params["masked"] = scores.Masked(shapes[0], key)
    return step.init_state(params, settings.model, train)

  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(make, key)
  state = jax.tree.map(lambda x: placed(x, P() if x.sharding is None else x.sharding.spec), state)
  number = lambda *shape: placed(jax.ShapeDtypeStruct(shape, jnp.int32), P("data"))
  data, b, p = settings.data, train.batch, train.batch * (1 + train.negatives)
  layout = layout or batches.layout(data, train, over.size, tied=settings.model.tied)
  shapes = layout.rows(train.batch)

  def rows(tower: str, texts: int, longest: int, lead: int) -> Any:
    elsewhere = tower == "queries" and layout.together
    if tower not in shapes and not elsewhere:
      return None
    packed: Any = {}
    if layout.packed and tower != "masked":
      packed = {"starts": number(texts), "unit": texts * layout.unit // b, "longest": longest}
    one: Any = None if elsewhere else number(*shapes[tower])
    return Rows(one, one, one, one, **packed, lead=lead)

  lead = 2 if data.markers else 1
  batch = scores.Batch(
    queries=rows("queries", b, data.query_length, lead),
    passages=rows("passages", p, data.passage_length, lead),
    pairs=rows("pairs", p, data.pair_length, 1),
  )
  if train.needs_pairs:
    batch = dataclasses.replace(batch, texts=number(p), known=number(b, 1))
  if train.on.mlm:
    places: Any = number(b, train.predicted)
    batch = dataclasses.replace(batch, masked=scores.MaskedRows(rows("masked", b, 0, 1), places, places))
  return state, batch, placed(key, P())


def held(tree: Any) -> int:
  """Bytes of the tree's arrays on one device."""
  leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


@contextlib.contextmanager
def telling(label: str, every: float = 30.0) -> Iterator[None]:
  """Says that it is still compiling, now and then: the compiler gives no sign for minutes."""
  done, begin = threading.Event(), time.monotonic()

  def tell():
    while not done.wait(every):
      say(f"  {label}: still compiling, {clock(time.monotonic() - begin)}")

  say(f"  {label}: compiling")
  teller = threading.Thread(target=tell, daemon=True)
  teller.start()
  try:
    yield
  finally:
    done.set()
    teller.join()
  say(f"  {label}: compiled in {clock(time.monotonic() - begin)}")


def typical(query: float, passage: float, count: int = 4096) -> batches.Texts:
  """Texts without content whose lengths are distributed as MS MARCO's (gamma), with so many tokens on average.

  Special tokens are included: two, a marker is not counted.
  """
  rng, no_tokenizer, special = np.random.default_rng(0), cast(Tokenizer, None), 2
  column = lambda mean, shape: columns.ragged(
    [np.zeros(max(1, round(n)), np.int32) for n in rng.gamma(shape, (mean - special) / shape, count)]
  )
  own, none = columns.ragged([np.array([i]) for i in range(count)]), columns.ragged([np.zeros(0, np.int32)] * count)
  return batches.Texts(column(query, 4), column(passage, 5), np.arange(count), own, none, no_tokenizer)


def plan(settings: Config, stage: Stage, topology: str, texts: batches.Texts | None = None) -> Plan:
  """Compiles the stage's step for the slice. `DoesNotFit` where a chip's memory is too small, other `UserError`s.

  Packed rows are as many as texts of such lengths need; None: as if every text were the longest.
  """
  train: config.Train = getattr(settings, stage)
  chips = slice_of(topology)
  shapes = architectures(settings.model)
  step.divides(train, chips)
  longest = min(a.positions for a in shapes)
  check(settings.data.pair_length <= longest, "data.passage_length", settings.data.passage_length, "too long a pair")
  data = settings.data if texts is None else dataclasses.replace(settings.data, markers=False)
  layout, slice_mesh = batches.layout(data, train, chips, texts, settings.model.tied), mesh.make(devices(topology))
  with jax.set_mesh(slice_mesh), telling(f"{topology}, {stage}"):
    state, batch, key = arguments(settings, train, slice_mesh, layout)
    jitted: Any = step.make_train_step(settings.model, train)
    lowered = jitted.lower(state, batch, key)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if (short := out_of_memory(str(error))) is None:
        raise UserError(f"{topology}: the compiler refuses the {stage} step ({first_line(error)})") from error
      needed, there = (x / GIB for x in short)
      raise DoesNotFit(
        f"{topology}: the {stage} step needs {needed:.2f} of {there:.2f} GiB on each chip (parameters "
        f"{held(state.params) / GIB:.2f}, optimizer state {held(state.optimizer) / GIB:.2f}); try "
        + ", ".join(itertools.chain(*step.less_memory(settings.model, train, stage, chips, layout.packed)))
        + ", or more chips"
      ) from error
  hlo = compiled.as_text()
  found, entry = computations(hlo)
  stats = compiled.memory_analysis()
  parts = {
    "parameters": held(state.params),
    "optimizer state": held(state.optimizer),
    "batch": held(batch),
  }
  memory = parts | {
    # Tiles of arguments and results have room to spare; results in the place of donated arguments cost nothing.
    "padding, logs": stats.argument_size_in_bytes
    - sum(parts.values())
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
    "generated code": stats.generated_code_size_in_bytes,
  }
  return Plan(
    stage,
    topology,
    chips,
    train,
    memory,
    cost.flops(*shapes, settings.model, train, settings.data, layout.rows(train.batch)),
    total_cycles(found, entry),
    collectives(found, entry, chips),
    operations(found, entry, sources(hlo)),
  )


# --- what the user reads


def table(made: Plan) -> str:
  """The plan in lines."""
  chip, train, each = made.family.chip, made.train, made.train.batch // made.chips
  total = sum(made.memory.values())
  share, overhead = made.flops / made.chips, made.communicating / made.step_time
  lines = [
    f"{made.topology}, {made.chips} chips: {made.stage} step of {train.batch} queries x {1 + train.negatives} passages"
    f" ({each} queries a chip)",
    "the compiler's estimate, not a measurement",
    "memory of each chip",
    *(f"  {name:16} {amount / GIB:9.2f} GiB" for name, amount in made.memory.items()),
    f"  {'total':16} {total / GIB:9.2f} GiB of {chip.memory / GIB:.2f}: "
    + ("fits" if total <= chip.memory else "does not fit"),
    "communication, a ring over all chips",
  ]
  kinds: dict[str, list[Collective]] = defaultdict(list)
  for c in made.collectives:
    kinds[c.kind].append(c)
  for kind, group in sorted(kinds.items()):
    amount = sum(c.bytes * c.times for c in group)
    spent = sum(seconds(c, made.chips, chip.interconnect) for c in group)
    count = sum(c.times for c in group)
    lines.append(f"  {kind:16} {amount / GIB:9.3f} GiB in {count} operations: {1e3 * spent:.1f} ms")
  lines += [
    "time of a step",
    f"  model FLOPs      {made.flops:9.2e}, {share:.2e} a chip: {share / chip.flops:.3f} s at its peak of "
    f"{chip.flops / 1e12:.0f} TFLOP/s",
    f"  computing        {made.computing:9.3f} s: {made.cycles:.3e} cycles at {made.family.hertz / 1e9:.2f} GHz",
    f"  communicating    {made.communicating:9.3f} s: {overhead:.1%} of the step, if none of it overlaps",
    f"  step             {made.step_time:9.3f} s: MFU {made.mfu:.1%}, {made.rate:.0f} queries/s",
  ]
  return "\n".join(lines)


def sweep(settings: Config, stage: Stage, topology: str, texts: batches.Texts | None = None) -> Iterator[str]:
  """Weak scaling over 16 to 256 chips of the topology's family, its batch per chip held; one line each, as it comes."""
  family = topology.split(":")[0]
  train: config.Train = getattr(settings, stage)
  chips = slice_of(topology)
  check(train.batch % chips == 0, f"{stage}.batch", train.batch, f"does not divide over {chips} chips of {topology}")
  yield f"{'slice':12} {'chips':>5} {'batch':>7} {'GiB':>6} {'step s':>8} {'MFU':>6} {'queries/s':>10} {'scaling':>8}"
  first: Plan | None = None
  for sides in FAMILIES[family].slices:
    name = f"{family}:{sides}"
    batch = train.batch // chips * slice_of(name)
    changed: dict[str, Any] = {stage: dataclasses.replace(train, batch=batch)}
    own = dataclasses.replace(settings, **changed)
    try:
      made = plan(own, stage, name, texts)
    except DoesNotFit as error:
      yield f"{name:12} {slice_of(name):5d} {batch:7d} does not fit: {str(error).partition(': ')[2].partition(';')[0]}"
      continue
    first = first or made
    scaling = made.rate / made.chips / (first.rate / first.chips)
    yield (
      f"{name:12} {made.chips:5d} {batch:7d} {sum(made.memory.values()) / GIB:6.2f} {made.step_time:8.3f} "
      f"{made.mfu:6.1%} {made.rate:10.0f} {scaling:8.1%}"
    )
