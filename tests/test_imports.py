"""The order of files: each imports only files above it, and the model needs no data stack."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ernie_jax"
ORDER = [
  "config",
  "signals",
  "mesh",
  "topk",
  "kernels",
  "encoder",
  "scores",
  "losses",
  "step",
  "cost",
  "progress",
  "columns",
  "datasets",
  "tokens",
  "templates",
  "masking",
  "pseudo",
  "batches",
  "hub",
  "checkpoints",
  "names",
  "unpickle",
  "pretrained",
  "train",
  "bm25",
  "retrieval",
  "collection",
  "index",
  "search",
  "evaluate",
  "mining",
  "attention",
  "draw",
  "report",
  "recipe",
  "ablate",
  "plan",
  "graph",
  "export",
  "serve",
  "verbs",
  "__main__",
]


def own_imports(path: Path) -> set[str]:
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == "ernie_jax":
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ernie_jax."):
      found.add(node.module.split(".")[1])
    elif isinstance(node, ast.Import):
      found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ernie_jax.")}
  return found


def test_every_file_has_its_place():
  there = {p.stem for p in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
  assert there - {"__init__"} == set(ORDER)


def test_each_file_imports_only_files_above_it():
  for place, name in enumerate(ORDER):
    files = [PACKAGE / f"{name}.py"] if (PACKAGE / f"{name}.py").is_file() else (PACKAGE / name).glob("*.py")
    for file in files:
      below = own_imports(file) - set(ORDER[:place]) - {name}
      assert not below, f"{file.name} imports {sorted(below)} from below"


def test_the_map_in_the_package_names_every_file():
  text = (PACKAGE / "__init__.py").read_text()
  for name in ORDER:
    assert f"{name}/" in text or f"{name}.py" in text, name


def modules_after(statement: str) -> set[str]:
  code = f"import sys; {statement}; print(' '.join(sys.modules))"
  return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_model_and_the_step_need_no_data_stack():
  loaded = modules_after("import ernie_jax.step")
  heavy = {
    "tensorflow_datasets",
    "grain",
    "transformers",
    "tokenizers",
    "jaxtyping",
    "beartype",
    "matplotlib",
    "orbax.checkpoint",
  }
  # flax imports parts of orbax by itself; what counts is that our files run where the data stack is not installed.
  assert not loaded & (heavy - {"orbax.checkpoint"})


def test_the_package_itself_is_light():
  assert "jax" not in modules_after("import ernie_jax")
  assert not {"jax", "tensorflow_datasets"} & modules_after("import ernie_jax.config, ernie_jax.__main__")
