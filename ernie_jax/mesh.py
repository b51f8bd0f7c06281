"""The device mesh: one axis, `data`, over all devices of all hosts. Batches are split by query, parameters are whole.

One jitted step serves a laptop, a GPU and a pod: what used to be `pmap` (one program per device) and `pjit` (jit with
shardings) is `jax.jit` on arrays that carry their sharding. The axis is explicit, so the compiler inserts no hidden
communication: the encoders run on each device's own rows (`per_device`), passages for cross-batch negatives are
gathered by `replicate`, and nothing else moves but sums over queries, the gradient, and the parameters that each device
has updated its share of.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ernie_jax.config import Hosts, UserError, first_line

WAIT = 300  # seconds for all processes to come


def join(hosts: Hosts) -> None:
  """Joins the processes, before any device is used; `UserError` where N silent separate runs would follow."""
  given = [f"--{f}" for f in ("coordinator", "processes", "process") if getattr(hosts, f) is not None]
  if not hosts.multihost:
    if given:
      raise UserError(f"{given[0]}: is for a run of several processes; add --multihost")
    if (several := next((f"{name}={n}" for name, n in _launched() if n > 1), None)) is not None:
      raise UserError(f"{several}: a launcher started several processes, each would be a run; add --multihost")
    return
  for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
    if not os.environ.get(name, "0").isdigit():
      raise UserError(f"{name}={os.environ[name]}: is not a number; put right what the launcher sets")
  number = lambda own, name: own if own is not None else int(os.environ[name]) if name in os.environ else None
  coordinator = hosts.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
  processes, process = number(hosts.processes, "JAX_NUM_PROCESSES"), number(hosts.process, "JAX_PROCESS_ID")
  known = {"--coordinator": coordinator, "--processes": processes, "--process": process}
  if given and (missing := [flag for flag, value in known.items() if value is None]):
    raise UserError(f"{given[0]}: needs {' and '.join(missing)} too; or none of them, under Slurm, MPI or on a TPU")
  if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
    raise UserError(f"--coordinator {coordinator}: is not HOST:PORT")
  if processes is not None and processes < 2:
    raise UserError(f"--processes {processes}: one process needs no --multihost; leave it out")
  if process is not None and processes is not None and not 0 <= process < processes:
    raise UserError(f"--process {process}: must lie in 0..{processes - 1}, one for each process")
  if coordinator is not None:
    print(f"joining the other processes at {coordinator}, for up to {WAIT} s", file=sys.stderr, flush=True)
    if process:
      _answers(coordinator)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of processes without an accelerator
  try:
    jax.distributed.initialize(coordinator, processes, process, initialization_timeout=WAIT)
  except (ValueError, RuntimeError) as error:  # nothing detected; nobody answered
    raise UserError(
      f"--multihost: the processes did not find each other ({first_line(error)}); check --coordinator HOST:PORT, "
      "--processes N and --process I, or the launcher"
    ) from error


def _answers(coordinator: str) -> None:
  """`UserError` if nobody answers there: JAX itself would end the process with a stack dump."""
  host, _, port = coordinator.rpartition(":")
  end = time.monotonic() + WAIT
  while True:
    try:
      socket.create_connection((host, int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > end:
        raise UserError(
          f"--coordinator {coordinator}: nobody answers there ({error}); is process 0 running, and the port open?"
        ) from error
      time.sleep(0.5)


def _launched() -> Iterator[tuple[str, int]]:
  """How many processes a launcher says it has started, by the variable that says so."""
  for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE", "JAX_NUM_PROCESSES"):
    if os.environ.get(name, "").isdigit():
      yield name, int(os.environ[name])
  yield "TPU_WORKER_HOSTNAMES", len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))


def leads() -> bool:
  """Whether this is process 0, the one that writes what all share."""
  return jax.process_index() == 0


def wait(what: str) -> None:
  """Until every process has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def first(what: str) -> Iterator[None]:
  """Process 0 does the work while the others wait; then they do it, finding what it left."""
  if not leads():
    wait(what)
  yield
  if leads():
    wait(what)


def told(answer: Any) -> Any:
  """Process 0's answer (a number or an array of them), the same in every process."""
  return multihost_utils.broadcast_one_to_all(np.array(answer)) if jax.process_count() > 1 else answer


def every(answer: bool) -> bool:
  """Whether all processes say yes, the same in every process."""
  return bool(multihost_utils.process_allgather(np.array(answer)).all()) if jax.process_count() > 1 else answer


_asked = 0  # how often `asked_to_stop` was called: JAX's service wants numbers that grow, the same in every process


def asked_to_stop() -> bool:
  """Whether one of several processes got SIGTERM, which JAX holds then; the same answer in every process.

  All processes must call it at the same points, between which they do the same work.
  """
  global _asked
  if jax.process_count() == 1:
    return False
  _asked += 1
  return multihost_utils.reached_preemption_sync_point(_asked)


def agree(what: str, content: str) -> None:
  """`UserError` unless every process has the same content."""
  if jax.process_count() == 1:
    return
  own = np.frombuffer(hashlib.sha256(content.encode()).digest(), np.uint8)
  digests = np.asarray(multihost_utils.process_allgather(own))
  if other := [i for i, digest in enumerate(digests) if not np.array_equal(digest, digests[0])]:
    raise UserError(f"{what} of process {other[0]} is not that of process 0; start all processes with the same command")


def make(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh over all devices of all hosts, or the given ones. Use it as `with jax.set_mesh(mesh.make()):`."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Explicit,), devices=devices)


def share(mesh: Mesh, size: int) -> np.ndarray:
  """The rows of a global batch of `size` that this host holds, in the mesh's order."""
  each = size // mesh.devices.size
  own = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
  return np.concatenate([np.arange(i * each, (i + 1) * each) for i in own])


def shard(tree: Any, mesh: Mesh) -> Any:
  """Host arrays [b, ...], this host's `share` of the global batch -> global arrays, split along the first axis."""
  split = NamedSharding(mesh, P("data"))
  here = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]

  def place(x):
    parts = [jax.device_put(part, device) for part, device in zip(np.split(x, len(here)), here)]
    size = len(x) // len(here) * mesh.devices.size
    return jax.make_array_from_single_device_arrays((size, *x.shape[1:]), split, parts)

  return jax.tree.map(place, tree)


def whole(tree: Any, mesh: Mesh) -> Any:
  """The tree's arrays, complete on every device: how parameters are held. Every host passes the same values."""

  everywhere = lambda x: NamedSharding(mesh, P(*[None] * x.ndim))  # as jit writes it: P() alone would be compiled anew
  there = lambda x: isinstance(x, jax.Array) and x.sharding == everywhere(x)
  if all(map(there, jax.tree.leaves(tree))):
    return tree  # to build a module anew takes longer than to encode a query

  def place(x):
    if there(x):
      return x
    own = np.asarray(x)  # not `device_put`: with several hosts it would send all values around, to compare them
    return jax.make_array_from_callback(own.shape, everywhere(own), lambda index: own[index])

  return jax.tree.map(place, tree)


def size() -> int:
  """Devices of the mesh in use; 1 without a mesh."""
  here = jax.sharding.get_abstract_mesh()
  return 1 if here.empty else here.size


def compiler_options() -> dict[str, str]:
  """How the devices of the mesh in use want a step compiled.

  A TPU's compiler lets one operation take 16 MiB of vector memory, of which v5 and v6 have several times as much: too
  little for products that keep two results or sum rows on the way, which are then cut so that they are estimated at up
  to three times as long.
  """
  here = jax.sharding.get_mesh()
  device = jax.devices()[0] if here.empty else here.devices.flat[0]
  return {"xla_tpu_scoped_vmem_limit_kib": "32768"} if device.device_kind.startswith(("TPU v5", "TPU v6")) else {}


def replicate(x: jax.Array) -> jax.Array:
  """Every device's rows on every device: the one gather of the forward pass. Without a mesh, `x` itself."""
  here = jax.sharding.get_abstract_mesh()
  if here.empty:
    return x
  if AxisType.Manual in here.axis_types:  # inside `per_device`
    return jax.lax.all_gather(x, "data", tiled=True)
  return jax.sharding.reshard(x, P())


def split(x: jax.Array) -> jax.Array:
  """The array, split over the devices along its first axis that they divide; whole if there is none, or no mesh."""
  here = jax.sharding.get_abstract_mesh()
  if here.empty:
    return x
  axis = next((i for i, n in enumerate(x.shape) if n and n % here.size == 0), None)
  return x if axis is None else jax.sharding.reshard(x, P(*[None] * axis, "data"))


def per_device(function: Callable[..., Any], params: Any, *rows: Any) -> Any:
  """`function(params, *rows)` on each device's own share of the rows; what it returns is split in the same way.

  The gradient of `params` is summed over the devices once, after the whole backward pass of `function`: without
  `pcast`, a loop over chunks would sum it at every turn.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return function(params, *rows)

  def local(params, *rows):
    return function(jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), params), *rows)

  return jax.shard_map(local, in_specs=(P(), *[P("data")] * len(rows)), out_specs=P("data"))(params, *rows)
