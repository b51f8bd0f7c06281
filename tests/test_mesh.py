"""Hosts that find each other, or say in one line why not; rows that go where they belong."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ernie_jax import mesh
from ernie_jax.__main__ import main
from ernie_jax.config import Hosts, UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
  ("hosts", "words"),
  [
    (Hosts(coordinator="a:1"), "--coordinator: is for a run of several processes; add --multihost"),
    (Hosts(processes=2, process=0), "--processes: is for a run of several"),
    (Hosts(True, "a:1"), "--coordinator: needs --processes and --process too"),
    (Hosts(True, None, 2, 0), "--processes: needs --coordinator too"),
    (Hosts(True, "here", 2, 0), "--coordinator here: is not HOST:PORT"),
    (Hosts(True, "a:1", 1, 0), "--processes 1: one process needs no --multihost"),
    (Hosts(True, "a:1", 2, 2), r"--process 2: must lie in 0\.\.1"),
  ],
)
def test_wrong_settings_are_one_line(hosts, words):
  with pytest.raises(UserError, match=words):
    mesh.join(hosts)


@pytest.mark.parametrize(
  ("name", "value"), [("SLURM_STEP_NUM_TASKS", "4"), ("WORLD_SIZE", "2"), ("TPU_WORKER_HOSTNAMES", "a,b")]
)
def test_a_launcher_of_several_processes_needs_the_flag(monkeypatch, name, value):
  """Without it each process would train a model of its own."""
  monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=f"{name}=.*would be a run; add --multihost"):
    mesh.join(Hosts())


def test_one_process_joins_nobody(monkeypatch):
  monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
  mesh.join(Hosts())
  assert not jax.distributed.is_initialized()


def command(*flags: str, **environment: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-m", "ernie_jax", "run", "configs/tiny.py", "--multihost", *flags],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def test_multihost_without_a_launcher_is_one_line(tmp_path):
  process = command("--output", str(tmp_path / "run"))
  said = process.communicate()[1]
  assert process.returncode == 2, said
  assert "the processes did not find each other" in said
  assert said.count("\n") == 1
  assert not (tmp_path / "run").exists()


def test_processes_with_different_commands_or_folders_stop(tmp_path):
  """One line from each, exit code 2, at once."""
  for flags in ((["--seed", "1"], ["--seed", "2"]), ([], ["--output", str(tmp_path / "other")])):
    coordinator = f"127.0.0.1:{port()}"
    children = [
      command("--output", str(tmp_path / "run"), *own, JAX_COORDINATOR_ADDRESS=coordinator, **numbers)
      for own, numbers in zip(flags, ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)} for i in (0, 1)))
    ]
    said = [child.communicate(timeout=120)[1] for child in children]
    assert all(child.returncode for child in children)
    assert any("the command of process 1 is not that of process 0" in text for text in said), said
    assert not (tmp_path / "run").exists()


def test_rows_go_where_the_mesh_says_and_come_back():
  grid = mesh.make()
  rows = mesh.share(grid, 16)
  np.testing.assert_array_equal(rows, np.arange(16))  # one process holds them all, in order
  x = mesh.shard(np.arange(32).reshape(16, 2), grid)
  np.testing.assert_array_equal(x, np.arange(32).reshape(16, 2))
  assert x.sharding.shard_shape(x.shape) == (2, 2)
  with jax.set_mesh(grid):
    np.testing.assert_array_equal(mesh.replicate(x), x)
    halves = mesh.split(jax.numpy.zeros((3, 16)))
    assert halves.sharding.shard_shape((3, 16)) == (3, 2)
    assert mesh.split(jax.numpy.zeros((3, 5))).sharding.is_fully_replicated


def test_help_knows_the_flags(capsys):
  with pytest.raises(SystemExit):
    main(["run", "--help"])
  said = capsys.readouterr().out
  assert all(flag in said for flag in ("--multihost", "--coordinator", "--processes", "--process "))
