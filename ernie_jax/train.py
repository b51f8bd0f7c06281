"""The training loop of one stage: joins data, step, checkpoints and logs. The recipe decides what runs when."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import jax

from ernie_jax import batches, config, mesh, step
from ernie_jax.checkpoints import Checkpoints
from ernie_jax.config import UserError
from ernie_jax.progress import Progress, say
from ernie_jax.scores import Params


class Interrupted(KeyboardInterrupt):
  """Ctrl-C during training: everything up to the last whole step is saved."""


@dataclasses.dataclass
class Stop:
  """Turns Ctrl-C into a request that the loop answers between two steps; a second Ctrl-C ends the process at once."""

  asked: bool = False

  def __enter__(self) -> Stop:
    try:
      self.before = signal.signal(signal.SIGINT, self._ask)
    except ValueError:  # not in the main thread: leave Ctrl-C as it is
      self.before = None
    return self

  def _ask(self, *_: Any) -> None:
    self.asked = True
    signal.signal(signal.SIGINT, signal.SIG_DFL)

  def __exit__(self, kind, value, trace) -> None:
    if self.before is not None:
      signal.signal(signal.SIGINT, self.before)


def train(
  directory: Path,
  params: Params,
  texts: batches.Texts,
  model: config.Model,
  data: config.Data,
  stage: config.Train,
  seed: int,
) -> tuple[Params, int]:
  """Trains one stage in `directory`, or continues it: the parameters after its last step, and how often it compiled.

  Call under `jax.set_mesh(mesh.make())`. Leaves `checkpoints/` (state and data position), `log.jsonl` (every term of
  every step) and TensorBoard events. Raises `Interrupted` after Ctrl-C, `UserError` if the loss is not finite.
  """
  from tensorboardX import SummaryWriter

  # ---- Data, state: from the newest checkpoint, else from the given parameters.
  devices = jax.sharding.get_abstract_mesh().size
  if stage.batch % devices:
    good = ", ".join(str(max(1, stage.batch // devices + i) * devices) for i in (0, 1))
    raise UserError(f"batch={stage.batch}: does not divide over {devices} devices; use {good}")
  data_mesh = mesh.make()
  iterator = batches.batches(texts, data, stage, seed)
  key = jax.random.fold_in(jax.random.key(seed), 0x7EA)  # not the key that made the parameters
  # The step donates its state: train on a copy, so that the caller's parameters stay valid.
  state = step.init_state(jax.tree.map(jax.numpy.copy, params), model, stage)
  train_step: Any = step.make_train_step(model, stage)

  with Checkpoints(directory / "checkpoints") as checkpoints, Stop() as stop:
    if (found := checkpoints.newest(state)) is not None:
      state, position = found
      iterator.set_state(position)
    done = int(state.step)
    if 0 < done < stage.steps:
      say(f"  continues at step {done}")
    log = _Log(directory / "log.jsonl", done)
    board = SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1)

    # ---- The loop. Reading the logs waits for the step, which virtual CPU devices need.
    start = time.monotonic()
    with Progress(directory.name, stage.steps, "steps", done) as bar, log, board:
      for number in range(done + 1, stage.steps + 1):
        batch = mesh.shard(next(iterator), data_mesh)
        try:
          state, logs = train_step(state, batch, key)
        except jax.errors.JaxRuntimeError as error:
          if "RESOURCE_EXHAUSTED" not in str(error):
            raise
          raise UserError(
            f"{directory.name}: the device's memory is too small for batch={stage.batch}; lower it, or set model.remat"
          ) from error
        terms = {name: float(x) for name, x in logs.items()}
        log.write(number, terms, time.monotonic() - start)
        for name, x in terms.items():
          board.add_scalar(f"train/{name}", x, number)
        bad = [name for name in (*stage.weights.active, "gradient_norm") if not math.isfinite(terms[name])]
        if bad:
          raise UserError(
            f"{directory.name}, step {number}: {', '.join(sorted(bad))} is not finite; lower optimizer.learning_rate"
          )
        stopping = stop.asked  # read once: it may change at any moment
        if number % stage.checkpoint_every == 0 or number == stage.steps or stopping:
          checkpoints.save(state, iterator.get_state())
        bar.advance(1, f"loss {terms['total']:.3f}")
        if stopping:
          raise Interrupted(f"{directory.name}: stopped and saved after step {number}")
  return state.params, train_step._cache_size()


def finished(directory: Path, params: Params, model: config.Model, stage: config.Train) -> Params:
  """The parameters after a finished stage's last step, arranged as `params`."""
  like = step.init_state(params, model, stage)
  with Checkpoints(directory / "checkpoints") as checkpoints:
    return checkpoints.at(stage.steps, like).params


class _Log:
  """One JSON line a step. Lines after the step that training continues from are dropped, so none is there twice."""

  def __init__(self, path: Path, done: int):
    kept = []
    if path.exists():
      for line in path.read_text().splitlines():
        try:
          kept += [line] if json.loads(line)["step"] <= done else []
        except ValueError:  # a line cut short by a kill
          break
    config.write(path, "".join(line + "\n" for line in kept))
    self.path = path

  def __enter__(self) -> _Log:
    self.file = open(self.path, "a", buffering=1)
    return self

  def __exit__(self, kind, value, trace) -> None:
    self.file.close()

  def write(self, number: int, terms: dict[str, float], seconds: float) -> None:
    apart = ("total", "gradient_norm", "learning_rate")
    line = {"step": number, "terms": {k: v for k, v in terms.items() if k not in apart}}
    line |= {k: terms[k] for k in apart} | {"seconds": round(seconds, 3)}
    self.file.write(json.dumps(line) + "\n")
