"""The training loop of one stage: joins data, step, checkpoints and logs. The recipe decides what runs when."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ernie_jax import batches, config, cost, losses, mesh, step
from ernie_jax.checkpoints import Checkpoints, described
from ernie_jax.config import Interrupted, UserError
from ernie_jax.progress import Progress, say
from ernie_jax.scores import Batch, Params


class Stop:
  """Turns Ctrl-C and SIGTERM into a request that the loop answers between two steps; a second one ends the process.

  With several processes one of them may be asked: JAX's coordination service, which holds SIGTERM then, lets all agree
  on the step.
  """

  def __init__(self):
    self.asked, self.before = 0, {}

  def __enter__(self) -> Stop:
    several = jax.process_count() > 1
    for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
      try:
        self.before[number] = signal.signal(number, self._pass_on if several else self._ask)
      except ValueError:  # not in the main thread: leave it as it is
        break
    return self

  def _ask(self, number: int, _: Any) -> None:
    self.asked = number
    signal.signal(number, signal.SIG_DFL)

  def _pass_on(self, number: int, _: Any) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)

  def after_step(self) -> int:
    """The signal that asks to stop after this step; 0 without one. The same answer in every process."""
    if jax.process_count() == 1:
      return self.asked
    return signal.SIGTERM if mesh.asked_to_stop() else 0

  @contextlib.contextmanager
  def lifted(self) -> Iterator[None]:
    """For a long job between two steps, after a save: one process answers at once, as outside of the loop."""
    if jax.process_count() > 1:
      yield
      return
    self.__exit__(None, None, None)
    try:
      yield
    finally:
      self.__enter__()

  def __exit__(self, kind, value, trace) -> None:
    for number, handler in self.before.items():
      signal.signal(number, handler)
    if self.asked and kind is None:  # too late for the last step's answer
      raise Interrupted("", self.asked)


@dataclasses.dataclass(frozen=True)
class Trained:
  """What a stage hands on."""

  params: Params  # in the host's memory: the next stage needs the devices'
  step: int  # whose parameters these are: the last, or the best measured
  compilations: int
  best: dict[str, Any] | None  # the best measured step and its metrics
  skipped: int  # steps without a finite gradient, up to `step`


def train(
  directory: Path,
  params: Params,
  texts: batches.Texts,
  model: config.Model,
  data: config.Data,
  stage: config.Train,
  seed: int,
  measure: Callable[[Params], dict[str, float]] | None = None,
  metric: str = "",
  refresh: Callable[[Params | None, int], batches.Texts] | None = None,
  every: int = 0,
) -> Trained:
  """Trains one stage in `directory`, or continues it.

  Call under `jax.set_mesh(mesh.make())`. `measure` gives dev metrics every `stage.measure_every` steps, of which
  `metric` decides which step is best and kept; without one, the last. `refresh` gives, after every `every` steps, the
  texts that training goes on with, from the parameters (in the host's memory) and the number of steps; or again, for a
  stage that continues and no longer has those parameters, from None and that number. Leaves `checkpoints/` (state and
  data position), `log.jsonl` (every term of every step, but for the last one before a crash) and TensorBoard events.
  Raises `Interrupted` after Ctrl-C or SIGTERM; `UserError` after `step.MOST_SKIPPED` steps in a row without a finite
  gradient, and where a checkpoint cannot be written.
  """
  # ---- Data, state: from the newest checkpoint, else from the given parameters.
  grid = mesh.make()
  step.divides(stage, grid.devices.size)
  layout = batches.layout(data, stage, grid.devices.size, texts, model.tied)
  ways = step.less_memory(model, stage, directory.name, grid.devices.size, layout.packed)
  read = lambda texts: batches.batches(texts, data, stage, seed, layout, mesh.share(grid, stage.batch))
  iterator = read(texts)
  key = jax.random.fold_in(jax.random.key(seed), 0x7EA)  # not the key that made the parameters
  work = cost.flops(*shapes(params), model, stage, data, layout.rows(stage.batch))
  state: Any = step.init_state(mesh.whole(jax.tree.map(np.array, params), grid), model, stage)  # a copy, to be donated
  train_step: Any = step.make_train_step(model, stage)
  best: dict[str, Any] | None = None

  saved = Checkpoints(directory / "checkpoints", stage.keep)
  # In the end the iterator is closed, whichever it is by then; checkpoints wait for their last save.
  with Stop() as stop, contextlib.ExitStack() as end, saved as checkpoints:
    end.callback(lambda: iterator.close())
    if checkpoints.any():
      like, state = described(state), None  # there is room for one state only
      state, position, best = checkpoints.newest(like)
      iterator.set_state(position)
    done = int(state.step)
    if 0 < done < stage.steps:
      say(f"  continues at step {done}")

    # ---- The loop. Reading logs waits for their step: that comes after the next one was given to the devices, but for
    # several virtual ones of a CPU, whose programs must not overlap.
    start = read_at = time.monotonic()
    overlaps = jax.default_backend() != "cpu" or jax.local_device_count() == 1
    with Progress(directory.name, stage.steps, "steps", done) as bar, _Log(directory, stage, done) as log:
      unread: tuple[int, Batch, dict[str, jax.Array]] | None = None  # the step before, while it may not be done

      def read_logs(number: int, batch: Batch, logs: dict[str, jax.Array]) -> tuple[int, dict, dict]:
        """A step's number, terms and speed; waits for it."""
        nonlocal read_at
        with _room(directory.name, stage.batch, *ways):
          terms = {name: float(x) for name, x in jax.device_get(logs).items()}
        _warn(directory, stage, number, terms)
        seconds, read_at = time.monotonic() - read_at, time.monotonic()
        return number, terms, rates(batch, stage, seconds, work) if number > done + 1 else {}  # not while compiling

      def write(number: int, terms: dict[str, float], speed: dict[str, float], dev: dict[str, float]) -> None:
        log.write(number, terms, speed, dev, time.monotonic() - start)
        shown = metric or next(iter(dev), "")
        bar.advance(1, f"loss {terms['total']:.3f}" + (f", {shown} {dev[shown]:.3f}" if dev else ""))

      def measured(number: int) -> tuple[dict[str, float], int]:
        """Metrics after this step, and the signal that came meanwhile: the measurement belongs to its step."""
        nonlocal best
        if measure is None or not stage.measure_every:
          return {}, 0
        try:
          dev, asked = measure(state.params), 0
        except Interrupted as error:
          dev, asked = measure(state.params), error.signal
        if metric and mesh.told(best is None or dev[metric] > best["metrics"][metric]):
          best = {"step": number, "metrics": dev}
        return dev, asked

      for number in range(done + 1, stage.steps + 1):
        if refresh is not None and number > every and (number == done + 1 or (number - 1) % every == 0):
          last = (number - 1) // every * every
          with stop.lifted():
            texts = refresh(jax.device_get(state.params) if last == number - 1 else None, last)
          position = iterator.get_state()
          iterator.close()
          iterator = read(texts)
          iterator.set_state(position)  # the same examples, with other negatives
          read_at = time.monotonic()
        batch = next(iterator)
        with _room(directory.name, stage.batch, *ways):
          state, logs = train_step(state, mesh.shard(batch, grid), key)
        if unread is not None:
          write(*read_logs(*unread), {})
        unread = number, batch, logs

        # ---- Measure, save, log, stop.
        due = number == stage.steps or bool(stage.measure_every and number % stage.measure_every == 0)
        saves = number % stage.checkpoint_every == 0 or due or bool(every and number % every == 0)
        stopping = 0
        if saves or not overlaps:
          line, unread = read_logs(*unread), None
          dev, stopping = measured(number) if due else ({}, 0)
          write(*line, dev)
        stopping = stop.after_step() or stopping  # read once: it may change at any moment
        if saves or stopping:
          if unread is not None:
            write(*read_logs(*unread), {})
          checkpoints.save(state, iterator.get_state(), best)
          read_at = time.monotonic()
        if stopping:
          raise Interrupted(f"{directory.name}: stopped and saved after step {number}", stopping)
    kept = stage.steps if best is None else best["step"]
    if kept != stage.steps:
      like = described(state)
      del state
      state = checkpoints.at(kept, like)
    result = jax.device_get(state.params)
    skipped = int(state.optimizer.total_notfinite)
  return Trained(result, kept, train_step._cache_size(), best, skipped)


@contextlib.contextmanager
def _room(name: str, batch: int, same: list[str], other: list[str]) -> Iterator[None]:
  """Says what to do where the device's memory is too small: what a run may go on with, and what asks for a new one."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    ways = [*([", ".join(same)] if same else []), *([f"{', '.join(other)} in a new run"] if other else [])]
    more = ", or ".join(ways) or "more devices"
    raise UserError(f"{name}: the device's memory is too small for batch={batch}; try {more}") from error


def _warn(directory: Path, stage: config.Train, number: int, terms: dict[str, float]) -> None:
  """Of a step without a finite gradient; `UserError` after `step.MOST_SKIPPED` in a row."""
  if not terms["skipped_in_a_row"]:
    return
  spoilt = [name for name in sorted(stage.on.active) if not math.isfinite(terms[name])]
  what = ", ".join(spoilt) or "the gradient of a finite loss"
  if terms["skipped_in_a_row"] >= step.MOST_SKIPPED:
    raise UserError(
      f"{directory.name}, step {number}: {what} is not finite, {step.MOST_SKIPPED} steps in a row; "
      "lower optimizer.learning_rate"
    )
  say(f"  step {number} skipped: {what} is not finite")


def finished(directory: Path, params: Params, model: config.Model, stage: config.Train, kept: int) -> Params:
  """The parameters that a finished stage handed on, those after step `kept`, arranged as `params`."""
  like = described(step.init_state(mesh.whole(params, mesh.make()), model, stage))
  with Checkpoints(directory / "checkpoints", stage.keep) as checkpoints:
    return jax.device_get(checkpoints.at(kept, like).params)


def shapes(params: Params) -> tuple[config.Architecture, config.Architecture]:
  """Of student and cross-encoder."""
  student, teacher = params["student"].encoder, params["teacher"].encoder
  return student.architecture, (student if teacher is None else teacher).architecture


def rates(batch: Batch, stage: config.Train, seconds: float, work: float) -> dict[str, float]:
  """Speed of one step over all devices, its data included; `batch` is this host's share, `work` the step's FLOPs."""
  masked = None if batch.masked is None else batch.masked.rows
  towers = batch.queries, batch.passages, batch.pairs, masked
  used = [rows for rows in towers if rows is not None and rows.tokens is not None]
  tokens = sum(rows.tokens.size for rows in used) * jax.process_count()
  real = sum(int(np.count_nonzero(rows.segments)) for rows in used) * jax.process_count()
  share = cost.mfu(work, seconds, jax.device_count())
  found = {"queries_per_second": stage.batch / seconds, "tokens_per_second": tokens / seconds}
  return found | {"real_tokens": real / tokens} | ({} if share is None else {"mfu": share})


class _Log:
  """One JSON line a step, and TensorBoard; process 0 writes.

  Lines after the step that training continues from are dropped, so none is there twice.
  """

  def __init__(self, directory: Path, stage: config.Train, done: int):
    self.path, self.stage = directory / "log.jsonl", stage
    if not mesh.leads():
      return
    from tensorboardX import SummaryWriter

    kept = []
    if self.path.exists():
      for line in self.path.read_text().splitlines():
        try:
          kept += [line] if json.loads(line)["step"] <= done else []
        except ValueError:  # a line cut short by a kill
          break
    config.write(self.path, "".join(line + "\n" for line in kept))
    self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1)

  def __enter__(self) -> _Log:
    if mesh.leads():
      self.file = open(self.path, "a", buffering=1)
    return self

  def __exit__(self, kind, value, trace) -> None:
    if mesh.leads():
      self.file.close()
      self.board.close()

  def write(
    self, number: int, terms: dict[str, float], speed: dict[str, float], dev: dict[str, float], seconds: float
  ) -> None:
    if not mesh.leads():
      return
    scalars = {f"train/{name}": x for name, x in terms.items()} | {f"speed/{name}": x for name, x in speed.items()}
    weights = losses.scheduled(self.stage.weights, self.stage.final_weights, step.done(number - 1, self.stage))
    scalars |= {f"weight/{name}": weights[name] for name in self.stage.on.active}
    scalars |= {f"dev/{name}": x for name, x in dev.items()}
    for name, x in scalars.items():
      self.board.add_scalar(name, x, number)
    own = {name: x for name, x in terms.items() if name in self.stage.on.active}
    line = {"step": number, "terms": own} | {name: x for name, x in terms.items() if name not in own}
    line |= {"seconds": round(seconds, 3)} | ({"dev": dev} if dev else {})
    self.file.write(json.dumps(line) + "\n")
