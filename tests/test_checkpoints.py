"""Checkpoints and saved models: exact round trips; every damaged file is noticed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from ernie_jax import checkpoints, config, step
from ernie_jax.checkpoints import Checkpoints
from ernie_jax.config import Optimizer, Train, UserError, Weights

MODEL = config.Model(late_width=8)
STAGE = Train(steps=4, batch=8, negatives=2, weights=Weights.only(nll_ce=1), optimizer=Optimizer())


@pytest.fixture(scope="module")
def state():
  return step.init_state(step.init_params(MODEL, TINY, TINY, jax.random.key(0)), MODEL, STAGE)


def at(state, number):
  """The state as if it stood at a step, with other values at every step."""
  moved = jax.tree.map(lambda x: x + number if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
  return moved.replace(step=jnp.asarray(number, jnp.int32))


def same(a, b):
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def save(directory, state, *numbers):
  with Checkpoints(directory) as manager:
    for number in numbers:
      manager.save(at(state, number), {"next_index": number})
      manager.manager.wait_until_finished()


def newest(directory, state):
  with Checkpoints(directory) as manager:
    return manager.newest(state)


def test_a_state_comes_back_bit_for_bit_with_its_position(state, tmp_path):
  save(tmp_path / "c", state, 1, 2)
  got, position = newest(tmp_path / "c", state)
  assert same(got, at(state, 2))
  assert position == {"next_index": 2}
  with Checkpoints(tmp_path / "c") as manager:
    assert same(manager.at(1, state), at(state, 1))


def test_nothing_saved_is_none(state, tmp_path):
  assert newest(tmp_path / "c", state) is None


def test_only_the_newest_are_kept(state, tmp_path):
  save(tmp_path / "c", state, 1, 2, 3, 4)
  assert sorted(int(p.name) for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == [3, 4]


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
