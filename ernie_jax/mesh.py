"""The device mesh: one axis, `data`. Parameters are whole on every device, batches are split by query.

One jitted step serves a laptop, a GPU and a pod: what used to be `pmap` (one program per device) and `pjit` (jit with
shardings) is `jax.jit` on arrays that carry their sharding. The axis is explicit, so the compiler inserts no hidden
communication in the forward pass: the gather of passages for cross-batch negatives is the call of `replicate`.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make() -> Mesh:
  """A mesh over all devices of all hosts. Use it as `with jax.set_mesh(mesh.make()):`."""
  return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Explicit,))


def shard(tree: Any, mesh: Mesh) -> Any:
  """Host arrays [b, ...] (this host's share of the global batch) -> global arrays, split along the first axis."""
  split = NamedSharding(mesh, P("data"))
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), tree)


def whole(tree: Any, mesh: Mesh) -> Any:
  """The tree's arrays, complete on every device: how parameters are held."""
  return jax.device_put(tree, NamedSharding(mesh, P()))


def replicate(x: jax.Array) -> jax.Array:
  """Every device's rows on every device: the one gather of the forward pass. Without a mesh, `x` itself."""
  return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, P())
