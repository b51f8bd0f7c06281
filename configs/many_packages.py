"""small_student.py on the docstrings of 224 packages: 91,291 passages, and a test set six times as large.

  pip install --no-deps --only-binary=:all: --target more -r configs/many_packages.txt      (their docstrings are read)
  PYTHONPATH=more ernie-jax ablate configs/many_packages.py --output runs/many_packages --rows no_teacher

and before, as there, what makes runs/encoder. Measured on 2 CPU cores, one seed (RESULTS.md): the cascade and training
without a cross-encoder (LI->DE) end alike, 0.386 and 0.388 in the dual-encoder; BM25 has 0.492.
"""

import dataclasses
from pathlib import Path

import small_student

from ernie_jax.config import Data

MORE = Path(__file__).with_suffix(".txt").read_text().split()

settings = small_student.config
config = dataclasses.replace(
  settings,
  data=dataclasses.replace(
    settings.data,
    packages=(*Data().packages, *(name.partition("==")[0] for name in MORE)),
    passage_length=60,  # so that a run keeps the corpus' token vectors
  ),
  warmup=dataclasses.replace(settings.warmup, steps=400),
)
