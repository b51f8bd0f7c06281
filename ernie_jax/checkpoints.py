"""Training state on disk through Orbax, saved in the background, checked when read; models as safetensors."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ernie_jax import config, mesh, step
from ernie_jax.config import UserError, first_line
from ernie_jax.progress import say
from ernie_jax.scores import Params


class _Damage(Exception):
  """A checkpoint that is not what was saved."""


class Checkpoints:
  """The checkpoints of one training stage: the newest `keep` of them, and the best measured one.

  Each holds every array of the state by name, the data iterator's position, the best measured step so far, and CRC-32
  sums of them all: Orbax restores an overwritten file silently. Arrays are whole in name and shape, so they are read
  onto any number of devices or hosts. Use as a context manager; leaving it waits for the last save.
  """

  def __init__(self, directory: Path, keep: int = 2):
    import orbax.checkpoint as ocp

    self.ocp, self.directory, self.keep, self.best = ocp, directory, keep, -1
    directory.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(preservation_policy=self, create=False, cleanup_tmp_directories=True)
    self.manager = ocp.CheckpointManager(directory.resolve(), options=options)
    # Orbax would ask JAX's service for SIGTERM too, with numbers of its own, which spoil those of `mesh.asked_to_stop`.
    self.manager.reached_preemption = lambda step: False

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Orbax's question."""
    return [i >= len(checkpoints) - self.keep or c.step == self.best for i, c in enumerate(checkpoints)]

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind, value, trace) -> None:
    failed = kind is not None and issubclass(kind, Exception)  # the first error is the one to show
    with self._saving(), contextlib.suppress(Exception) if failed else contextlib.nullcontext():
      self.manager.close()

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # a full disk surfaces as errors of many types, some of them in the background
      raise UserError(
        f"{self.directory}: a checkpoint cannot be written ({reason(error)}); earlier ones are intact: "
        "make room or choose another place, and the same command continues"
      ) from error

  def save(self, state: Any, position: dict[str, Any], best: dict[str, Any] | None = None) -> None:
    """Starts saving `state` (with a `step`), the iterator's `position` and the `best` measured step so far."""
    arrays = named(state)
    sums = {name: checksum(x) for name, x in arrays.items()}
    meta: dict[str, Any] = {"position": position, "best": best, "crc32": sums}
    meta["own_crc32"] = zlib.crc32(json.dumps(meta, sort_keys=True).encode())
    items = self.ocp.args.Composite(state=self.ocp.args.StandardSave(arrays), meta=self.ocp.args.JsonSave(meta))
    self.best = best["step"] if best else -1
    with self._saving():
      saved = self.manager.save(int(state.step), args=items)
    if not saved:
      raise RuntimeError(f"{self.directory}: step {int(state.step)} was not saved: a newer one is there")

  def any(self) -> bool:
    """Whether there is a checkpoint, whole or damaged."""
    return mesh.told(bool(self.manager.all_steps()))

  def newest(self, like: Any) -> tuple[Any, dict[str, Any], dict[str, Any] | None]:
    """State, position and best step of the newest intact checkpoint, the state arranged as `like`.

    Damaged newer ones are passed over and set aside (saving goes on from the older). `UserError` if none is intact.
    """
    damage, damaged = "", []
    for number in sorted(self.manager.all_steps(), reverse=True):
      try:
        state, meta = self._read(number, like)
      except _Damage as error:
        damage = damage or f"step {number}: {error}"
        damaged.append(number)
        continue
      for broken in damaged:
        aside = self.directory / f"damaged-{broken}"
        say(f"  checkpoint {self.directory / str(broken)} is damaged: now {aside.name}, continuing from step {number}")
        if mesh.leads():
          shutil.rmtree(aside, ignore_errors=True)
          (self.directory / str(broken)).rename(aside)
      mesh.wait("damaged checkpoints are aside")
      self.manager.reload()
      self.best = meta["best"]["step"] if meta["best"] else -1
      return state, meta["position"], meta["best"]
    raise UserError(f"{self.directory}: no intact checkpoint ({damage}); delete this folder to train the stage again")

  def at(self, number: int, like: Any) -> Any:
    """The state of exactly this step, such as a finished stage's result; `UserError` if it is missing or damaged."""
    self.manager.wait_until_finished()
    try:
      return self._read(number, like)[0]
    except _Damage as error:
      raise UserError(
        f"{self.directory}: step {number} cannot be read ({error}); "
        f"delete {self.directory.parent} to train the stage again"
      ) from error

  def _read(self, number: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """State and meta of a step; `_Damage` in every process if one cannot read it, or finds another content."""
    found: Any = None
    words = "another process cannot read it"
    try:
      found = self._restored(number, like)
    except Exception as error:  # damage surfaces as errors of many types, from JSON to the array store
      if "RESOURCE_EXHAUSTED" in str(error):
        raise UserError(f"{self.directory}: step {number}: the memory is too small for it") from error
      words = first_line(error)
    if not mesh.every(found is not None):
      raise _Damage(words)
    arrays, meta = found
    changed = [name for name, x in arrays.items() if checksum(x) != meta["crc32"].get(name)]
    if not mesh.every(not changed):
      raise _Damage(f"array {changed[0] if changed else 'in another process'} was changed after it was saved")
    return jax.tree.map(lambda name: arrays[name], step.names(like)), meta

  def _restored(self, number: int, like: Any) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    arrays = named(like)
    wanted = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in arrays.items()}
    # By Orbax's handlers: its manager ends in a barrier, where the others would wait for one that cannot read.
    place, args = (self.directory / str(number)).resolve(), self.ocp.args
    meta = self.ocp.JsonCheckpointHandler().restore(place / "meta", args=args.JsonRestore())
    state = self.ocp.StandardCheckpointHandler().restore(place / "state", args=args.StandardRestore(wanted))
    if meta.pop("own_crc32") != zlib.crc32(json.dumps(meta, sort_keys=True).encode()):
      raise ValueError("its position in the data was changed after it was saved")
    return state, meta


def described(tree: Any) -> Any:
  """The tree's shapes and shardings: enough to read a checkpoint, without the arrays' memory."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def named(tree: Any) -> dict[str, jax.Array]:
  """Every array of the tree by name."""
  return dict(zip(jax.tree.leaves(step.names(tree)), jax.tree.leaves(tree), strict=True))


def checksum(x: jax.Array) -> int:
  """CRC-32 of the whole array, however it is spread."""
  return zlib.crc32(np.ascontiguousarray(np.asarray(mesh.replicate(x))).tobytes())


def reason(error: BaseException) -> str:
  """What the system said at the bottom of a chain of errors: "No space left on device"."""
  while (deeper := error.__cause__ or error.__context__) is not None:
    error = deeper
  words = str(error)
  known = (text for text in map(os.strerror, (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG)))
  return next((text for text in known if text in words), first_line(Exception(words)))


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


def describe_model(directory: Path) -> dict[str, Any]:
  """What `model.json` says; a damaged or missing file is a `UserError`."""
  try:
    description = json.loads((directory / "model.json").read_text())
    return {name: description[name] for name in ("student", "teacher", "model", "sha256", "about")}
  except FileNotFoundError as error:
    raise UserError(f"{error.filename}: missing; `ernie-jax run` makes it when it finishes") from error
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{directory / 'model.json'}: damaged ({first_line(error)}); run the recipe again") from error


def load_model(directory: Path) -> tuple[Params, config.Model, dict[str, Any]]:
  """(parameters, model settings, `about`) of a saved model; a damaged or missing file is a `UserError`."""
  from safetensors.numpy import load

  description = describe_model(directory)
  try:
    raw = (directory / "model.safetensors").read_bytes()
    student, teacher = (architecture(description[name]) for name in ("student", "teacher"))
    fields = description["model"]
    scratch = {name: architecture(own) for name in ("scratch", "teacher_scratch") if (own := fields.get(name))}
    layers = tuple(fields.get("start_layers", ()))
    model = config.Model(**(fields | scratch | {"start_layers": layers}))
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
