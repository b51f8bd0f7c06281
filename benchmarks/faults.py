"""Kills the tiny recipe at random moments, restarts it, and compares its result with an uninterrupted run.

  python benchmarks/faults.py --folder /tmp/faults --rounds 3 [--disk MOUNT]

Each round starts anew and is killed (SIGKILL) once at every moment of MOMENTS: after a random delay in each stage, and
while a checkpoint is being written. Then it runs to its end. Prints one line a kill: the steps logged, and the newest
whole checkpoint; and, a round, whether every logged loss and the model's bytes equal the uninterrupted run's. `--disk`
names an empty folder on which a small disk is mounted (needs root): training until it is full, then with more room to
the end.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from ernie_jax.recipe import TRAINED

ROOT = Path(__file__).parent.parent
SAVE = "a save in "
MOMENTS = (
  *("prepare", "baselines", "interaction", SAVE + "interaction", "mine", "warmup", SAVE + "warmup", "check", "cascade"),
  *(SAVE + "cascade", "encode", "evaluate"),
)


def begin(output: Path, place: Path) -> subprocess.Popen:
  """Starts or continues the run; compiled programs are shared, so that a restart costs seconds."""
  command = [sys.executable, "-m", "ernie_jax", "run", "configs/tiny.py", "--output", str(output)]
  cache = {"JAX_COMPILATION_CACHE_DIR": str(place / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
  with open(place / f"{output.name}.log", "w") as log:
    return subprocess.Popen(
      [*command, "--data.cache", str(place / "cache")], cwd=ROOT, env=os.environ | cache, stdout=log, stderr=log
    )


def steps(output: Path, stage: str) -> int:
  """Logged steps of a training stage; a line cut short counts for nothing."""
  path = output / stage / "log.jsonl"
  return path.read_text().count("\n") if path.exists() else 0


def writing(output: Path, stage: str) -> set[tuple[str, int]]:
  """Checkpoints with a temporary name, which Orbax gives them until they are whole; and when each was begun."""
  folder = output / stage / "checkpoints"
  found = set()
  for path in folder.iterdir() if folder.exists() else ():
    with contextlib.suppress(FileNotFoundError):  # renamed just now
      found |= {(path.name, path.stat().st_ctime_ns)} if "tmp" in path.name else set()
  return found


def kill_at(moment: str, output: Path, place: Path, chance: random.Random) -> str:
  """Runs until the moment, kills, and says what was done and what was going on."""
  stage = moment.removeprefix(SAVE)
  log = place / f"{output.name}.log"
  left = writing(output, stage)  # by an earlier kill
  before = steps(output, stage)
  process = begin(output, place)
  while process.poll() is None and f"{stage}\n" not in log.read_text():
    time.sleep(0.002)
  if stage in TRAINED:  # compilation is long: count from the first new step
    while process.poll() is None and steps(output, stage) in (0, before):
      time.sleep(0.0005)
  if moment.startswith(SAVE):
    left = writing(output, stage)  # what an earlier kill left is gone by now
    while process.poll() is None and not writing(output, stage) - left:
      time.sleep(0.0005)
  else:
    time.sleep(chance.uniform(0, {"evaluate": 2.0, "interaction": 2.0}.get(stage, 0.6)))
  process.kill()
  process.wait()
  if process.returncode != -9:
    return f"ended before it ({process.returncode})"
  if stage not in TRAINED:
    return "killed"
  folder = output / stage / "checkpoints"
  whole = max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0) if folder.exists() else 0
  half = ", another half-written" if writing(output, stage) - left else ""
  return f"{steps(output, stage)} steps logged, checkpoint of step {whole}{half}"


def finish(output: Path, place: Path) -> None:
  process = begin(output, place)
  if process.wait():
    raise SystemExit((place / f"{output.name}.log").read_text())


def result(output: Path) -> tuple[list, bytes, str]:
  """Every logged loss, the final model, the metrics."""
  lines = [json.loads(line) for s in TRAINED for line in (output / s / "log.jsonl").read_text().splitlines()]
  losses = [(line["step"], line["terms"], line["total"], line["gradient_norm"]) for line in lines]
  return losses, (output / "model" / "model.safetensors").read_bytes(), (output / "metrics.json").read_text()


def same(output: Path, expected: tuple[list, bytes, str]) -> bool:
  return result(output) == expected


def compare(output: Path, expected: tuple[list, bytes, str]) -> str:
  words = ("losses", "model", "metrics")
  found = zip(words, result(output), expected, strict=True)
  return ", ".join(f"{word} {'identical' if a == b else 'DIFFERENT'}" for word, a, b in found)


def disk(mount: Path, place: Path, expected: tuple[list, bytes, str]) -> bool:
  """A disk that is full in the middle of training, and then is not."""
  tmpfs = lambda options: subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mount)], check=True)
  tmpfs("size=24m")
  try:
    output = mount / "full"
    code = begin(output, place).wait()
    said = (place / "full.log").read_text().splitlines()
    print(f"full disk: exit code {code}: {said[-1]}")
    subprocess.run(["mount", "-o", "remount,size=300m", str(mount)], check=True)
    finish(output, place)
    print(f"with more room: {compare(output, expected)}")
    return same(output, expected)
  finally:
    subprocess.run(["umount", str(mount)], check=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", type=Path, required=True)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--disk", type=Path)
  chosen = parser.parse_args()
  place, chance = chosen.folder.resolve(), random.Random(chosen.seed)
  if place.exists() and any(place.iterdir()):
    raise SystemExit(f"--folder {place}: holds files; name a new folder")
  place.mkdir(parents=True, exist_ok=True)
  finish(place / "whole", place)
  expected = result(place / "whole")
  killed, good = 0, True
  for number in range(1, chosen.rounds + 1):
    output = place / f"round{number}"
    for moment in MOMENTS:
      said = kill_at(moment, output, place, chance)
      killed += not said.startswith("ended")
      print(f"round {number}: killed in {moment}: {said}", flush=True)
    finish(output, place)
    good &= same(output, expected)
    print(f"round {number}: continued to the end: {compare(output, expected)}", flush=True)
  if chosen.disk:
    good &= disk(chosen.disk, place, expected)
  print(f"{killed} kills; " + ("every result identical" if good else "NOT all results identical"))
  if not good or not killed:
    raise SystemExit(1)


if __name__ == "__main__":
  main()
