"""The launch scripts: dry runs, rehearsals with stand-ins for what they start, and what their files may hold."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
SETTINGS = {"TPU_NAME": "pod", "TPU_ZONE": "zone-a", "IMAGE": "registry/ernie:1"}
ARGS = ["configs/tiny.py", "--output", "/runs/it's a run", "--data.folder", 'C:\\"data" &', ""]
SHOWN = r"""configs/tiny.py --output '/runs/it'\''s a run' --data.folder 'C:\"data" &' ''"""
VENV = ["python3 -m venv .venv", ". .venv/bin/activate"]
PIP = "python -m pip install --quiet --disable-pip-version-check -e"
UNPACK = "mkdir -p ernie_jax && tar -xzf ernie_jax.tar.gz -C ernie_jax && cd ernie_jax"
POD = "pod --zone zone-a --worker=all"
COMMANDS = {
  "quickstart": [*VENV, f"{PIP} .", f"ernie-jax run configs/quickstart.py {SHOWN}"],
  "test": [
    *(*VENV, f"{PIP} '.[test]'", "ruff check", "ruff format --check", "mypy"),
    f"python -m pytest -n 2 --dist loadfile --no-loadscope-reorder {SHOWN}",
  ],
  "gpu": [*VENV, f"{PIP} '.[cuda]'", f"env CUDA_VISIBLE_DEVICES=0 ernie-jax run {SHOWN}"],
  "gpus": [*VENV, f"{PIP} '.[cuda]'", f"ernie-jax run {SHOWN}"],
  "tpu": [*VENV, f"{PIP} '.[tpu]'", f"ernie-jax run {SHOWN}"],
  "tpu_pod": [
    "mkdir -p build",
    "git archive --output build/ernie_jax.tar.gz HEAD",
    "gcloud compute tpus tpu-vm scp build/ernie_jax.tar.gz pod: --zone zone-a --worker=all",
    f"gcloud compute tpus tpu-vm ssh {POD} --command "
    + shlex.quote(f"{UNPACK} && bash launch/tpu.sh {SHOWN} --multihost").replace("'\"'\"'", r"'\''"),
  ],
  "slurm": [
    *(*VENV, f"{PIP} '.[cuda]'"),
    f"srun env JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7 ernie-jax run {SHOWN} --multihost",
  ],
  "gke": ["kubectl apply -f -"],
}
STAND_INS = {  # written to a folder at the front of PATH
  "python3": "exit 0",
  "python": 'echo "python $*" >>"$HOME/pip" && exit "${PIP_STATUS:-0}"',
  "ernie-jax": r"""printf '%s\n' "$@" >"$HOME/arguments"; env >"$HOME/environment" """,
  "srun": '"$@"',
  "gcloud": 'case $4 in scp) cp "$5" "$HOME" ;; ssh) cd "$HOME" && bash -c "${!#}" ;; esac',
  "kubectl": 'cat >"$HOME/manifest"',
}


@pytest.fixture
def checkout(tmp_path):
  """A copy of what the scripts read, in a folder whose name has a space."""
  for name, body in STAND_INS.items():
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
  (tmp_path / "home" / "venv").mkdir(parents=True)
  shutil.copytree(ROOT / "launch", tmp_path / "a copy" / "launch")
  shutil.copy(ROOT / "setup.cfg", tmp_path / "a copy")
  return tmp_path / "a copy"


def launch(checkout, script, *args, venv=False, **settings):
  home = checkout.parent / "home"
  path = f"{checkout.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
  settings = {"PATH": path, "HOME": str(home), **({"VIRTUAL_ENV": str(home / "venv")} if venv else {}), **settings}
  return subprocess.run(["bash", script, *args], cwd=checkout, env=settings, capture_output=True, text=True)


def arguments(checkout):
  return (checkout.parent / "home" / "arguments").read_text().split("\n")[:-1]


def environment(checkout):
  lines = (checkout.parent / "home" / "environment").read_text().splitlines()
  return dict(line.split("=", 1) for line in lines if "=" in line)


def documents(text):
  """(volume claim, JobSet) of a manifest that the schema admits."""
  schema = json.loads((ROOT / "tests" / "fixtures" / "jobset.schema.json").read_text())
  claim, jobset = yaml.safe_load_all(text)
  for document in (claim, jobset):
    jsonschema.validate(document, schema)
  return claim, jobset


def container(jobset):
  return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


def test_every_script_is_tested_short_and_in_the_readme():
  assert [path.stem for path in SCRIPTS] == sorted([*COMMANDS, "environment"])
  readme = (ROOT / "README.md").read_text()
  for path in SCRIPTS:
    assert len(path.read_text().splitlines()) <= 32, path.name
    assert path.stem == "environment" or f"launch/{path.name}" in readme


@pytest.mark.parametrize("script", COMMANDS)
def test_dry_run(checkout, script):
  before = sorted(checkout.parent.rglob("*"))
  done = launch(checkout, f"launch/{script}.sh", "--dry-run", *ARGS, **SETTINGS)
  shown, rest = done.stdout.splitlines()[: len(COMMANDS[script])], done.stdout.splitlines()[len(COMMANDS[script]) :]
  assert (done.returncode, done.stderr) == (0, "")
  assert shown == [f"+ {command}" for command in COMMANDS[script]]
  assert sorted(checkout.parent.rglob("*")) == before  # nothing is written, and no stand-in was called
  if script == "gke":
    assert container(documents("\n".join(rest))[1])["args"] == ["run", *ARGS, "--multihost"]
    return
  assert rest == []
  words = shlex.split(shown[-1])
  words = shlex.split(words[-1]) if script == "tpu_pod" else words
  assert [word for word in words if word != "--multihost"][-len(ARGS) :] == ARGS


@pytest.mark.parametrize(
  ("script", "args", "says"),
  [
    *((name, [], f"usage: launch/{name}.sh [--dry-run] CONFIG --output DIR ...") for name in list(COMMANDS)[2:]),
    ("gpu", ["--output", "runs/a"], "usage: "),
    ("slurm", ["configs/tiny.py", "--output", "a", "--fresh"], "launch: --fresh would start anew at every restart"),
    ("gke", ["configs/tiny.py", "--output", "/runs/a", "--fresh"], "launch: --fresh would start anew"),
    ("gpus", ["configs/tiny.py", "--outputs", "runs/a"], "usage: "),
    ("tpu_pod", ARGS, "set TPU_NAME and TPU_ZONE"),
    ("gke", ARGS, "set IMAGE"),
  ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["real", "dry"])
def test_mistakes_are_one_line(checkout, script, args, says, dry):
  done = launch(checkout, f"launch/{script}.sh", *dry, *args)
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
  assert says in done.stderr


def test_gke_wants_the_shared_volume(checkout):
  done = launch(checkout, "launch/gke.sh", "configs/tiny.py", "--output", "runs/a", **SETTINGS)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == "launch: --output must be in /runs, the volume that all hosts share\n"


def test_no_python(checkout):
  for name in ("python3", "python3.11", "python3.12", "python3.13"):
    (checkout.parent / "bin" / name).write_text("#!/bin/sh\nexit 1\n")
    (checkout.parent / "bin" / name).chmod(0o755)
  done = launch(checkout, "launch/quickstart.sh")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == "launch: Python 3.11 or newer is needed and was not found; install it first\n"


def test_one_host_installs_once_and_starts_the_command(checkout):
  first = launch(checkout, "launch/gpu.sh", *ARGS, venv=True)
  assert first.stderr.splitlines() == [f"+ {command}" for command in COMMANDS["gpu"][2:]]
  assert arguments(checkout) == ["run", *ARGS]
  assert environment(checkout)["CUDA_VISIBLE_DEVICES"] == "0"
  again = launch(checkout, "launch/gpu.sh", *ARGS, venv=True, CUDA_VISIBLE_DEVICES="3")
  assert again.stderr == f"+ env CUDA_VISIBLE_DEVICES=3 ernie-jax run {SHOWN}\n"
  launch(checkout, "launch/gpus.sh", *ARGS, venv=True)
  assert "CUDA_VISIBLE_DEVICES" not in environment(checkout)
  launch(checkout, "launch/tpu.sh", *ARGS, venv=True)  # other extras: installed once more
  assert (checkout.parent / "home" / "pip").read_text().count("\n") == 2


def test_a_failed_installation_ends_it(checkout):
  done = launch(checkout, "launch/gpu.sh", *ARGS, venv=True, PIP_STATUS="1")
  assert done.returncode == 1
  assert not (checkout.parent / "home" / "arguments").exists()
  assert not list((checkout.parent / "home" / "venv").iterdir())


def test_slurm_runs_its_copy_of_the_script(checkout):
  spool = checkout.parent / "spool" / "slurm_script"
  spool.parent.mkdir()
  shutil.move(checkout / "launch" / "slurm.sh", spool)
  slurm = {"SLURM_SUBMIT_DIR": str(checkout), "SLURM_GPUS_ON_NODE": "4"}
  done = launch(checkout, str(spool), *ARGS, venv=True, **slurm)
  assert done.returncode == 0, done.stderr
  assert arguments(checkout) == ["run", *ARGS, "--multihost"]
  assert environment(checkout)["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3"


def test_slurm_options():
  text = (ROOT / "launch" / "slurm.sh").read_text()
  assert text.index("#SBATCH") < text.index("set -e")  # sbatch stops reading options at the first command
  options = dict(
    re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups() for line in re.findall(r"#SBATCH.*", text)
  )
  known = "job-name nodes ntasks-per-node gpus-per-node exclusive mem signal requeue open-mode"
  assert set(options) == set(known.split())
  assert options["ntasks-per-node"] == "1"
  assert options["signal"] == "TERM@120"
  assert options["open-mode"] == "append"
  assert options["gpus-per-node"] == re.search(r"SLURM_GPUS_ON_NODE:-(\d+)", text)[1]


def test_tpu_pod_copies_and_starts(checkout):
  git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(checkout)]
  (checkout / ".gitignore").write_text("build/\n")
  for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
    subprocess.run([*git, *command], check=True)
  done = launch(checkout, "launch/tpu_pod.sh", *ARGS, venv=True, **SETTINGS)
  assert done.returncode == 0, done.stderr
  assert "warning" not in done.stderr
  assert arguments(checkout) == ["run", *ARGS, "--multihost"]
  assert Path(environment(checkout)["PWD"]) == checkout.parent / "home" / "ernie_jax"
  (checkout / "launch" / "tpu.sh").write_text("exit 1\n")
  done = launch(checkout, "launch/tpu_pod.sh", *ARGS, venv=True, **SETTINGS)
  assert done.returncode == 0  # the change is not committed, so it did not travel
  assert "launch: warning: only what is committed is copied\n" in done.stderr


def test_gke_fills_in_the_jobset(checkout):
  done = launch(checkout, "launch/gke.sh", *ARGS, **SETTINGS)
  assert done.returncode == 0, done.stderr
  assert (done.stdout, done.stderr) == ("", "+ kubectl apply -f -\n")
  filled = documents((checkout.parent / "home" / "manifest").read_text())
  expected = documents((ROOT / "launch" / "jobset.yaml").read_text())
  container(expected[1]).update(image="registry/ernie:1", args=["run", *ARGS, "--multihost"])
  assert filled == expected  # nothing else changed


def test_jobset():
  claim, jobset = documents((ROOT / "launch" / "jobset.yaml").read_text())
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
  assert job["parallelism"] == job["completions"] == 64
  assert job["completions"] * container(jobset)["resources"]["limits"]["google.com/tpu"] == x * y == 256
  assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
  assert pod["volumes"][0]["name"] == container(jobset)["volumeMounts"][0]["name"]
  assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize(
  "change",
  [
    lambda job, pod: job.update(completionsMode="Indexed"),
    lambda job, pod: job.update(completions="64"),
    lambda job, pod: job.pop("template"),
    lambda job, pod: pod.update(restartPolicy="Always"),
    lambda job, pod: pod["containers"][0].update(args="run"),
    lambda job, pod: pod["nodeSelector"].update({"cloud.google.com/gke-tpu-topology": 16}),
  ],
)
def test_the_schema_is_strict(change):
  claim, jobset = documents((ROOT / "launch" / "jobset.yaml").read_text())
  broken = copy.deepcopy(jobset)
  job = broken["spec"]["replicatedJobs"][0]["template"]["spec"]
  change(job, job["template"]["spec"])
  with pytest.raises(jsonschema.ValidationError):
    documents(yaml.safe_dump_all([claim, broken]))


def test_shellcheck():
  shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
  done = subprocess.run(
    [shellcheck, "-x", "-P", "SCRIPTDIR", *(f"launch/{path.name}" for path in SCRIPTS)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
