"""Real processes for tests of several hosts: `run("name", folder, ...)` calls a function below in two of them."""

import dataclasses
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
  os.environ["TESTS_DEVICES"] = "1"
  import conftest  # noqa: F401 (sets JAX up)

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax import config, mesh, scores, step  # the data stack where it is used: it may not be installed

COUNT = 2
MODEL = config.Model(late_width=8)
STAGE = config.Train(steps=4, batch=8, negatives=2, weights=config.Weights.only(nll_ce=1))


def run(name: str, folder: Path, **arguments: Any) -> Any:
  """What process 0's function returns; each process has one CPU device, and gloo between them."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{free.getsockname()[1]}"
  (folder / "arguments.pickle").write_bytes(pickle.dumps(arguments))
  command = [sys.executable, __file__, name, str(folder), coordinator]
  children = [
    subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for i in range(COUNT)
  ]
  try:
    said = [child.communicate(timeout=200)[0] for child in children]
  finally:
    for child in children:
      child.kill()
  assert all(child.returncode == 0 for child in children), "\n".join(said)
  return pickle.loads((folder / "result.pickle").read_bytes())


def gradients(model, train, tile):
  """Loss, terms and gradients of the tests' batch, of which each process holds its share."""
  import conftest

  scores.TILE = tile
  params = step.init_params(model, conftest.TINY, conftest.TINY, jax.random.key(0))
  grid = mesh.make()
  with jax.set_mesh(grid):
    rows = lambda x, size: x[mesh.share(grid, size)]
    batch = jax.tree.map(lambda x: rows(np.asarray(x), len(x)), conftest.make_batch())
    run = jax.jit(lambda p, b: step.gradient(p, b, model, train, jax.random.key(7)))
    return jax.device_get(run(mesh.whole(params, grid), mesh.shard(batch, grid)))


def at(state, number):
  """The state as if it stood at a step, with other values at every step."""
  moved = jax.tree.map(lambda x: x + number if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
  return moved.replace(step=jax.tree.map(lambda x: x * 0 + number, state.step))


def checkpoint(work, directory, devices=COUNT):
  """Saves steps 2 and 3 of the tests' state, or loads the newest, on some devices; the optimizer's state is split."""
  import conftest

  from ernie_jax import checkpoints

  grid = mesh.make(jax.devices()[:devices])
  with jax.set_mesh(grid), checkpoints.Checkpoints(directory) as manager:
    params = step.init_params(MODEL, conftest.TINY, conftest.TINY, jax.random.key(0))
    state = step.init_state(mesh.whole(params, grid), MODEL, STAGE)
    if work == "save":
      for number in (2, 3):
        manager.save(jax.jit(at, static_argnums=1)(state, number), {"next_index": number})
      return None
    found = manager.newest(state)[0]
    spread = [x for x in jax.tree.leaves(found.optimizer) if not x.sharding.is_fully_replicated]
    assert devices == 1 or spread
    return jax.tree.map(lambda x: np.asarray(mesh.replicate(x)), found)


def train(directory, stop, texts, params, model, data, stage):
  """Trains a stage; at step `stop` process 1 alone gets SIGTERM. What was logged, where it stopped, the parameters.

  Before, another stage with many saves: neither its steps nor its saves may disturb what is agreed in this one.
  """
  import conftest

  from ernie_jax import train as loop

  grid = mesh.make()
  step.make_train_step = conftest.shared(step.make_train_step)
  if stop:
    before = dataclasses.replace(stage, checkpoint_every=1)
    with jax.set_mesh(grid):
      loop.train(directory.with_name("before"), params, texts, model, data, before, 5)
  real, calls = mesh.shard, []

  def shard(*arguments):
    calls.append(1)
    if len(calls) == stop and not mesh.leads():
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(1)  # the coordination service hears of it within moments
    return real(*arguments)

  loop.mesh.shard = shard
  with jax.set_mesh(grid):
    try:
      found = loop.train(directory, params, texts, model, data, stage, 5)
    except config.Interrupted as stopped:
      return str(stopped), stopped.signal
    return jax.device_get(found.params), found.step


if __name__ == "__main__":
  function, place, address, number = sys.argv[1:]
  mesh.join(config.Hosts(True, address, COUNT, int(number)))
  found = globals()[function](**pickle.loads((Path(place) / "arguments.pickle").read_bytes()))
  if mesh.leads():
    (Path(place) / "result.pickle").write_bytes(pickle.dumps(found))
