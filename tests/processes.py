"""Real processes for tests of several hosts: `run("name", folder, ...)` calls a function below in two of them."""

import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

COUNT = 2


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
  said = [child.communicate()[0] for child in children]
  assert all(child.returncode == 0 for child in children), "\n".join(said)
  return pickle.loads((folder / "result.pickle").read_bytes())


def gradients(model, train):
  """Loss, terms and gradients of the tests' batch, of which each process holds its share."""
  import conftest
  import jax
  import numpy as np

  from ernie_jax import mesh, step

  params = step.init_params(model, conftest.TINY, conftest.TINY, jax.random.key(0))
  grid = mesh.make()
  with jax.set_mesh(grid):
    rows = lambda x, size: x[mesh.share(grid, size)]
    batch = jax.tree.map(lambda x: rows(np.asarray(x), len(x)), conftest.make_batch())
    run = jax.jit(jax.value_and_grad(lambda p, b: step.loss(p, b, model, train, jax.random.key(7)), has_aux=True))
    return jax.device_get(run(mesh.whole(params, grid), mesh.shard(batch, grid)))


if __name__ == "__main__":
  import os

  os.environ["TESTS_DEVICES"] = "1"
  import conftest  # noqa: F401 (sets JAX up)

  from ernie_jax import mesh

  function, place, address, number = sys.argv[1:]
  mesh.Hosts(True, address, COUNT, int(number)).start()
  found = globals()[function](**pickle.loads((Path(place) / "arguments.pickle").read_bytes()))
  if mesh.leads():
    (Path(place) / "result.pickle").write_bytes(pickle.dumps(found))
