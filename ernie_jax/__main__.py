"""The command line: `ernie-jax VERB ...`, the same as `python -m ernie_jax VERB ...`."""

from __future__ import annotations

import signal

from ernie_jax.signals import SIGNALS, leave

BEFORE = signal.getsignal(signal.SIGINT)
if BEFORE is signal.default_int_handler:
  signal.signal(signal.SIGINT, leave)  # Ctrl-C while this file imports

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from ernie_jax.config import Data, UserError
from ernie_jax.verbs import VERBS

if BEFORE is signal.default_int_handler:
  signal.signal(signal.SIGINT, BEFORE)

USAGE = """usage: ernie-jax VERB ...

  run CONFIG --output DIR [--fresh] [--seed 1] [--cascade.steps 200] [--multihost] ...
      the whole strategy: train, mine, distil, evaluate, report; the same command continues after an interruption
  encode RUN [NAME --from DIR] --output DIR [--texts corpus] [--late 16] [--dtype float16] [--multihost]
      a corpus (the run's, or another data set's), or the queries of a split, to vectors; the same command continues
  index DIR --index flat|hnsw|ivfpq|milvus:FILE.db|milvus:http://HOST:19530
      build an index over an encoded corpus or a finished run, or add what it lacks; prints its recall
  search DIR ["a query"] [--k 10] [--with bm25|dual|late|cross|hybrid] [--index hnsw] [--queries FILE --output RUN]
      search a finished run or an encoded corpus: one query, a file of lines `id TAB query`, or a prompt
  serve DIR [--port 8000] [--host 127.0.0.1] [--index hnsw]
      a page and a JSON API over a finished run or an encoded corpus: four rankings side by side, and how tokens match
  evaluate QRELS RUN [RUN ...] [--measures MRR@10 nDCG@10 ...] [--per-query FILE]
      measure runs in TREC format, and compare each with the first: difference, 95 % interval, significance
  evaluate DIR [--split test] [--depth 100] [--output RUNS]
      the same for a finished run or an encoded corpus: BM25, zero-shot, dual-encoder, late interaction, cross-encoder
  data NAME --from DIR [--skip-bad N] [--start CHECKPOINT_DIR] ...
      prepare a data set and show what is in it: counts, lengths in tokens, samples, and the command that trains on it;
      NAME is docstrings (of installed packages, without --from), jsonl, msmarco, dpr, beir, dureader or squad
  mine RUN [--first 1] [--last 30] [--sample 10] [--margin 0.0] [--denoise 0.1] [--output negatives.trec]
      hard negatives of the training queries from the run's student, without what its cross-encoder takes for right,
      as a TREC run; the cross-encoder's scores beside it
  import CHECKPOINT [--cross CHECKPOINT] [--layers 0 1 2] --output DIR
      released weights (Hugging Face, sentence-transformers, PyLate, PaddleNLP, RocketQA) as a model for the verbs above
  export RUN --to sentence-transformers|pylate|cross-encoder|hf|onnx --output DIR
      a finished run's model in the layout of another tool, with a model card
  ablate CONFIG --output DIR [--seeds 0 1 2] [--rows loss controls strategy full de_only ...] [--cascade.steps 200] ...
      the method without each of its parts, from the same start: a table with deviations over seeds and paired tests,
      and a plot; the same command continues, and further rows are added
  report RUN [RUN ...] [--output FILE]
      one page of a finished run: results, curves, samples where its rankers disagree, attention maps; of several runs
      and ablations: side by side, and what they were told differently
  plan CONFIG --topology v5e:16x16 [--stage cascade] [--sweep] [--cascade.batch 4096] ...
      memory, communication and time of a stage's step on a TPU slice, from the compiler, without a TPU

`ernie-jax VERB --help` lists the flags; every field of a configuration is one."""


def main(args: Sequence[str] | None = None) -> int:
  """Runs a verb; 0 when it is done, 2 after a mistake of the user's, 130 after Ctrl-C, 143 after SIGTERM."""
  if args is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # after the verb nothing is left to say: not a traceback
  try:
    code = _main(args)
  except Exception:
    if "jax" not in sys.modules or not sys.modules["jax"].distributed.is_initialized():
      raise
    traceback.print_exc()
    code = 1
  if code and "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
    # The others may wait for this process at a point it will never reach: end now, which ends them too.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LONG = ("run", "ablate", "encode", "mine", "serve")  # verbs that compute for long


def huge_pages() -> None:
  """Starts this process again with memory in huge pages, where Linux gives them to who asks (`madvise`).

  A step on a CPU takes gigabytes from the system each time: page by page of 4 KiB, a fifth of its time. glibc asks
  from its version 2.35, and only if a variable says so when the process starts.
  """
  try:
    asked = "[madvise]" in PAGES.read_text()
  except OSError:
    return  # the system has none
  old, again, process = os.environ.get("GLIBC_TUNABLES", ""), "ERNIE_JAX_STARTED_AGAIN", str(os.getpid())
  debugged = sys.gettrace() is not None or not sys.executable
  if not asked or "glibc.malloc.hugetlb" in old or debugged or os.environ.get(again) == process:
    return
  tunables = f"{old}:glibc.malloc.hugetlb=1".lstrip(":")
  sys.stdout.flush()
  sys.stderr.flush()
  with contextlib.suppress(OSError):
    # The process keeps its number: whatever becomes of the variable, this happens once.
    environment = os.environ | {"GLIBC_TUNABLES": tunables, again: process}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def keep_compiled() -> None:
  """Programs are compiled once, and read from there by whatever run asks for them again: jax reads this at its import.

  Where the folder cannot be written each process compiles for itself. A folder of the user's own is left as it is.
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  with contextlib.suppress(OSError, RuntimeError):
    place = Path(Data.cache).expanduser() / "compiled"
    place.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(place)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 << 30))  # bytes; then the longest unused ones go
    for program in place.glob("*-cache"):
      # JAX writes the time of its last use after it, and nothing any more where one lacks it: a killed process's.
      used = program.with_name(program.name.removesuffix("-cache") + "-atime")
      if not used.exists() and time.time() - program.stat().st_mtime > 60:
        program.unlink()


def _main(args: Sequence[str] | None) -> int:
  args = sys.argv[1:] if args is None else args
  if not args or args[0] in ("-h", "--help"):
    print(USAGE)
    return 0 if args else 2
  try:
    if args[0] not in VERBS:
      raise UserError(f"unknown verb {args[0]!r}; known are {', '.join(VERBS)}")
    keep_compiled()
    with SIGNALS:
      VERBS[args[0]](args[1:])
  except UserError as error:
    print(f"ernie-jax: {error}", file=sys.stderr)
    return 2
  except OSError as error:
    print(
      f"ernie-jax: {error.filename or ''}: {error.strerror or error}; check the path and its disk",
      file=sys.stderr,
    )
    return 2
  except KeyboardInterrupt as error:
    note = f"{error}; " if str(error) else ""
    print(f"\nernie-jax: {note}interrupted; give the same command again", file=sys.stderr)
    return 128 + getattr(error, "signal", signal.SIGINT)
  return 0


def command() -> int:
  """The program: `main`, in a process of its own."""
  if sys.argv[1:2] and sys.argv[1] in LONG:
    huge_pages()
  return main()


if __name__ == "__main__":
  sys.exit(command())
