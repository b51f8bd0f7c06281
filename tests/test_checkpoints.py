"""Checkpoints and saved models: exact round trips; every damaged file is noticed."""

import collections
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from conftest import TINY
from processes import MODEL, STAGE, at

from ernie_jax import checkpoints, step
from ernie_jax.checkpoints import Checkpoints
from ernie_jax.config import UserError


@pytest.fixture(scope="module")
def state():
  return step.init_state(step.init_params(MODEL, TINY, TINY, jax.random.key(0)), MODEL, STAGE)


def same(a, b):
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def save(directory, state, *numbers):
  with Checkpoints(directory) as manager:
    for number in numbers:
      manager.save(at(state, number), {"next_index": number})
      manager.manager.wait_until_finished()


def newest(directory, state):
  with Checkpoints(directory) as manager:
    return manager.newest(state)[:2]


def test_a_state_comes_back_bit_for_bit_with_its_position(state, tmp_path):
  save(tmp_path / "c", state, 1, 2)
  got, position = newest(tmp_path / "c", state)
  assert same(got, at(state, 2))
  assert position == {"next_index": 2}
  with Checkpoints(tmp_path / "c") as manager:
    assert same(manager.at(1, state), at(state, 1))


def test_nothing_saved_is_nothing_there(state, tmp_path):
  with Checkpoints(tmp_path / "c") as manager:
    assert not manager.any()
  save(tmp_path / "c", state, 1)
  with Checkpoints(tmp_path / "c") as manager:
    assert manager.any()


def test_only_the_newest_are_kept(state, tmp_path):
  save(tmp_path / "c", state, 1, 2, 3, 4)
  assert sorted(int(p.name) for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == [3, 4]


def test_the_best_step_outlives_newer_ones(state, tmp_path):
  best = lambda number: {"step": number, "metrics": {"MRR@10": 0.5}}
  with Checkpoints(tmp_path / "c", keep=1) as manager:
    for number, top in ((1, None), (2, best(2)), (3, best(2)), (4, best(2))):
      manager.save(at(state, number), {"next_index": number}, top)
  assert sorted(int(p.name) for p in (tmp_path / "c").iterdir()) == [2, 4]
  with Checkpoints(tmp_path / "c", keep=1) as manager:
    assert manager.newest(state)[2] == best(2)
    manager.save(at(state, 5), {"next_index": 5}, best(2))  # the best is known again after a restart
  assert sorted(int(p.name) for p in (tmp_path / "c").iterdir()) == [2, 5]


SMALL = step.State(jnp.asarray(0, jnp.int32), {"w": jnp.arange(300.0)}, {"m": jnp.arange(7.0)})


def harms(folder):
  """(what is done, to which file) for every single file of a checkpoint, and for its folders."""
  for path in sorted(folder.rglob("*")):
    kinds = ("overwrite", "truncate", "empty", "delete") if path.is_file() else ("empty directory", "delete directory")
    yield from ((kind, path) for kind in kinds)


def harm(kind, path):
  """Overwriting exchanges digits for others, so that JSON stays JSON, and inverts all other bytes."""
  raw = path.read_bytes() if path.is_file() else b""
  if kind == "overwrite":
    other = lambda x: 48 + (x - 47) % 10 if 48 <= x < 58 else x if b"{" in raw[:1] else 255 - x
    middle = len(raw) // 2
    path.write_bytes(raw[:middle] + bytes(map(other, raw[middle:][:64])) + raw[middle + 64 :])
  elif kind == "truncate":
    path.write_bytes(raw[: len(raw) // 2])
  elif kind == "empty":
    path.write_bytes(b"")
  elif kind == "delete":
    path.unlink()
  else:
    shutil.rmtree(path)
    if kind == "empty directory":
      path.mkdir()


@pytest.mark.timeout(600)
def test_no_single_damage_restores_a_wrong_state(tmp_path):
  """Every file and folder of the newest step, damaged in every way: that state, the one before, or an error."""
  save(tmp_path / "c", SMALL, 1, 2)
  relative = [(kind, path.relative_to(tmp_path / "c")) for kind, path in harms(tmp_path / "c" / "2")]
  assert len(relative) > 30
  outcomes = collections.Counter()
  for kind, path in relative:
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "c", copy)
    harm(kind, copy / path)
    got, position = newest(copy, SMALL)
    number = int(got.step)
    assert same(got, at(SMALL, number)), (kind, path)
    assert position == {"next_index": number}, (kind, path)
    outcomes[number] += 1
    shutil.rmtree(copy)
  assert outcomes[1] >= 20  # what is left, such as sharding of the writer, is not needed to read the step


@pytest.mark.parametrize(("writer", "reader"), [(8, 1), (1, 8), (8, "2 processes"), ("2 processes", 8), (8, 2)])
def test_a_checkpoint_restores_on_other_devices_and_hosts(state, tmp_path, writer, reader):
  """Optimizer state split over the devices (ZeRO-1) of the writer, read onto those of the reader."""
  for who, work in ((writer, "save"), (reader, "load")):
    if who == "2 processes":
      found = processes.run("checkpoint", tmp_path, work=work, directory=tmp_path / "c")
    else:
      found = processes.checkpoint(work, tmp_path / "c", who)
  assert same(found, at(state, 3))


def damage(directory, how):
  """Damages the newest step's largest array file, or its metadata."""
  folder = max((p for p in directory.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
  files = [p for p in folder.rglob("*") if p.is_file()]
  arrays = max((p for p in files if "meta" not in str(p)), key=lambda p: p.stat().st_size)
  if how == "overwritten":
    raw = bytearray(arrays.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 64] = np.random.default_rng(0).bytes(64)
    arrays.write_bytes(raw)
  elif how == "cut":
    arrays.write_bytes(arrays.read_bytes()[: arrays.stat().st_size // 2])
  elif how == "emptied":
    for file in files:
      file.write_bytes(b"")
  elif how == "deleted":
    for file in files:
      file.unlink()


@pytest.mark.parametrize("how", ["overwritten", "cut", "emptied", "deleted"])
def test_a_damaged_checkpoint_is_passed_over_or_named(state, tmp_path, how):
  save(tmp_path / "c", state, 1, 2)
  damage(tmp_path / "c", how)
  got, position = newest(tmp_path / "c", state)
  assert same(got, at(state, 1))
  assert position == {"next_index": 1}
  assert (tmp_path / "c" / "damaged-2").is_dir()
  with Checkpoints(tmp_path / "c") as manager, pytest.raises(UserError, match="step 2") as error:
    manager.at(2, state)
  assert "\n" not in str(error.value)


def test_when_all_are_damaged_the_error_names_the_folder(state, tmp_path):
  save(tmp_path / "c", state, 1)
  damage(tmp_path / "c", "cut")
  with pytest.raises(UserError, match="no intact checkpoint") as error:
    newest(tmp_path / "c", state)
  assert str(tmp_path / "c") in str(error.value)
  assert "\n" not in str(error.value)


def test_a_saved_model_comes_back_bit_for_bit(state, tmp_path):
  checkpoints.save_model(tmp_path, state.params, MODEL, {"student": "cascade"})
  params, model, about = checkpoints.load_model(tmp_path)
  assert same(params, state.params)
  assert jax.tree.structure(params) == jax.tree.structure(state.params)
  assert model == MODEL
  assert about == {"student": "cascade"}


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut", "changed"])
def test_a_damaged_model_is_one_line(state, tmp_path, name, how):
  checkpoints.save_model(tmp_path, state.params, MODEL, {})
  path = tmp_path / name
  raw = bytearray(path.read_bytes())
  if how == "missing":
    path.unlink()
  elif how == "cut":
    path.write_bytes(raw[: len(raw) // 2])
  else:
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
  with pytest.raises(UserError, match=name) as error:
    checkpoints.load_model(tmp_path)
  assert "\n" not in str(error.value)
