"""Training state on disk through Orbax, saved in the background, checked when read; models as safetensors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ernie_jax import config, step
from ernie_jax.config import UserError, first_line
from ernie_jax.progress import say
from ernie_jax.scores import Params

KEEP = 2  # the newest and one to fall back to


class Checkpoints:
  """The checkpoints of one training stage.

  Each holds every array of the state by name, the data iterator's position, and a CRC-32 of each array: Orbax restores
  an overwritten file silently. Use as a context manager; leaving it waits for the last save.
  """

  def __init__(self, directory: Path):
    import orbax.checkpoint as ocp

    self.ocp, self.directory = ocp, directory
    directory.mkdir(parents=True, exist_ok=True)
    self.manager = ocp.CheckpointManager(
      directory.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=KEEP, create=False)
    )

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind, value, trace) -> None:
    self.manager.close()

  def save(self, state: Any, position: dict[str, Any]) -> None:
    """Starts saving `state` (with a `step`) and the iterator's `position`."""
    arrays = named(state)
    meta = {"position": position, "crc32": {name: checksum(x) for name, x in arrays.items()}}
    items = self.ocp.args.Composite(state=self.ocp.args.StandardSave(arrays), meta=self.ocp.args.JsonSave(meta))
    if not self.manager.save(int(state.step), args=items):
      raise RuntimeError(f"{self.directory}: step {int(state.step)} was not saved: a newer one is there")

  def newest(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """State and position of the newest intact checkpoint, arranged as `like`; None where there is none at all.

    Damaged newer ones are passed over and deleted (saving goes on from the older). If all are damaged: `UserError`.
    """
    damage, damaged = "", []
    for number in sorted(self.manager.all_steps(), reverse=True):
      try:
        found = self._read(number, like)
      except Exception as error:  # damage surfaces as errors of many types, from JSON to the array store
        damage = damage or f"step {number}: {first_line(error)}"
        damaged.append(number)
        continue
      for broken in damaged:
        say(f"  checkpoint {self.directory / str(broken)} is damaged: deleted, continuing from step {number}")
        self.manager.delete(broken)
      return found
    if damage:
      raise UserError(f"{self.directory}: no intact checkpoint ({damage}); delete this folder to train the stage again")
    return None

  def at(self, number: int, like: Any) -> Any:
    """The state of exactly this step, such as a finished stage's last; `UserError` if it is missing or damaged."""
    try:
      return self._read(number, like)[0]
    except Exception as error:
      raise UserError(
        f"{self.directory}: step {number} cannot be read ({first_line(error)}); "
        f"delete {self.directory.parent} to train the stage again"
      ) from error

  def _read(self, number: int, like: Any) -> tuple[Any, dict[str, Any]]:
    arrays = named(like)
    wanted = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in arrays.items()}
    args = self.ocp.args
    read = self.manager.restore(
      number, args=args.Composite(state=args.StandardRestore(wanted), meta=args.JsonRestore())
    )
    for name, x in read["state"].items():
      if checksum(x) != read["meta"]["crc32"][name]:
        raise ValueError(f"array {name} was changed after it was saved")
    state = jax.tree.map(lambda name: read["state"][name], step.names(like))
    return state, read["meta"]["position"]


def named(tree: Any) -> dict[str, jax.Array]:
  """Every array of the tree by name."""
  return dict(zip(jax.tree.leaves(step.names(tree)), jax.tree.leaves(tree), strict=True))


def checksum(x: jax.Array) -> int:
  return zlib.crc32(np.ascontiguousarray(np.asarray(x)).tobytes())


def save_model(directory: Path, params: Params, model: config.Model, about: dict[str, Any]) -> None:
  """A trained model for use: `model.safetensors` and `model.json` (both architectures, settings, digest, `about`)."""
  from safetensors.numpy import save

  directory.mkdir(parents=True, exist_ok=True)
  arrays = save({name: np.asarray(x) for name, x in named(params).items()})
  student, teacher = params["student"].encoder, params["teacher"].encoder or params["student"].encoder
  description = {
    "student": dataclasses.asdict(student.architecture),
    "teacher": dataclasses.asdict(teacher.architecture),
    "model": dataclasses.asdict(model),
    "sha256": hashlib.sha256(arrays).hexdigest(),
    "about": about,
  }
  config.write(directory / "model.safetensors", arrays)
  config.write(directory / "model.json", json.dumps(description, indent=2))


def load_model(directory: Path) -> tuple[Params, config.Model, dict[str, Any]]:
  """(parameters, model settings, `about`) of a saved model; a damaged or missing file is a `UserError`."""
  from safetensors.numpy import load

  try:
    description = json.loads((directory / "model.json").read_text())
    raw = (directory / "model.safetensors").read_bytes()
    student, teacher = (architecture(description[name]) for name in ("student", "teacher"))
    scratch = architecture(description["model"]["scratch"])
    model = config.Model(**(description["model"] | {"scratch": scratch}))
  except FileNotFoundError as error:
    raise UserError(f"{error.filename}: missing; `ernie-jax run` makes it when it finishes") from error
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{directory / 'model.json'}: damaged ({first_line(error)}); run the recipe again") from error
  if hashlib.sha256(raw).hexdigest() != description["sha256"]:
    raise UserError(f"{directory / 'model.safetensors'}: damaged (SHA-256 differs); run the recipe again")
  arrays = load(raw)
  like = jax.eval_shape(lambda: step.init_params(model, student, teacher, jax.random.key(0)))
  params = jax.tree.map(lambda name: jax.numpy.asarray(arrays[name]), step.names(like))
  return params, model, description["about"]


def architecture(fields: dict[str, Any]) -> config.Architecture:
  """From JSON, where tuples are lists."""
  return config.Architecture(**(fields | {"special": tuple(fields["special"])}))
