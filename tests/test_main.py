"""The command line: mistakes end in one line that says what, where and what to do, with exit code 2."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import sources

from ernie_jax import __main__ as command
from ernie_jax import config, datasets, progress, tokens
from ernie_jax.__main__ import main

ERNIE = str(Path(__file__).parent / "fixtures" / "ernie")
TINY = str(Path(__file__).parent.parent / "configs" / "tiny.py")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """The data set is prepared once."""
  return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (["train"], "unknown verb 'train'; known are run, encode, index, search, "),
    (["run"], "name a configuration file first"),
    (["run", "nowhere.py"], "nowhere.py: no such configuration file"),
    (["run", TINY, "--cascade.stepps", "3"], "--cascade.stepps"),
    (["run", TINY, "--cascade.steps", "many"], "--cascade.steps"),
    (["run", TINY, "--cascade.steps", "-1"], "steps=-1: must be 0 or more"),
    (["run", TINY, "--model.pooling", "max"], "--model.pooling"),
    (["run", TINY, "--data.packages", "nosuchpackage"], "'nosuchpackage' is not installed"),
    (["run", TINY, "--model.start", "/nowhere"], "model.start='/nowhere': no such directory"),
    (["run", TINY, "--data.passage-length", "600"], "data.passage_length=600"),
    (["run", TINY, "--model.dropout", "0"], "cascade.weights.dualreg_query"),
    (["run", TINY, "--model.teacher-start", "/nowhere"], "model.teacher_start='/nowhere': no such directory"),
    (["run", TINY, "--model.teacher-start", ERNIE], "no tokenizer.json and no vocab.txt"),
    (["run", TINY, "--seed", "-1"], "seed=-1"),
    (
      ["run", TINY, "--post.steps", "9", "--post.mlm-length", "600"],
      "post.mlm_length=600: the encoder has 512 positions",
    ),
    (["run", TINY, "--post.steps", "9", "--post.mlm-texts", "/nowhere.txt"], "/nowhere.txt: cannot be read"),
    (["run", TINY, "--warmup.negatives", "100000"], "negatives=100000: the corpus of"),
    (["data"], "required"),
    (["data", "trec"], "invalid choice 'trec'"),
    (["data", "beir"], "data beir: name the folder with its files: --from DIR"),
    (["data", "beir", "--from", "/nowhere"], "data.folder='/nowhere': no such folder"),
    (["data", "beir", "--from", "/", "--skip-bad", "-1"], "data.skip_bad=-1"),
    (["data", "beir", "--from", "/", "--start", "/nowhere"], "/nowhere: no tokenizer.json and no vocab.txt"),
    (["search", "/nowhere", "a query"], "/nowhere: no finished run here"),
    (["search"], "required"),
    (["search", "/nowhere", "--k", "0"], "--k 0"),
  ],
)
def test_a_mistake_is_one_line(args, says, cache, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  extra = ["--data.cache", str(cache), "--output", str(tmp_path / "out")] if args[1:2] == [TINY] else []
  assert main([*args, *extra]) == 2
  printed = capsys.readouterr()
  errors = [line for line in printed.err.splitlines() if line.startswith("ernie-jax: ")]
  assert len(errors) == 1
  assert says in errors[0]
  assert printed.err.splitlines()[-1] == errors[0]
  assert printed.out == ""


@pytest.mark.parametrize(
  ("content", "says"),
  [
    ("config = 3", "defines no `config"),
    ("config =", "SyntaxError"),
    ("from ernie_jax.config import *\nMine(3, 2)", "mine.first=3"),
  ],
)
def test_a_wrong_configuration_file_is_one_line(content, says, tmp_path, capsys):
  (tmp_path / "c.py").write_text(content)
  assert main(["run", str(tmp_path / "c.py")]) == 2
  message = capsys.readouterr().err
  assert says in message
  assert "c.py" in message
  assert message.count("\n") == 1


def test_an_output_that_cannot_be_one_is_refused(tmp_path, capsys):
  (tmp_path / "file").write_text("")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.txt").write_text("")
  (tmp_path / "weights").mkdir()
  (tmp_path / "weights" / "config.json").write_text('{"model_type": "bert"}')  # a checkpoint's, not a run's
  (tmp_path / "list").mkdir()
  (tmp_path / "list" / "config.json").write_text("[]")
  refusals = {"file": "is a file", "full": "no run", "weights": "no run", "list": "no run"}
  for name, says in refusals.items():
    assert main(["run", TINY, "--output", str(tmp_path / name)]) == 2
    assert says in capsys.readouterr().err
    assert main(["run", TINY, "--output", str(tmp_path / name), "--fresh"]) == 2
  assert (tmp_path / "full" / "thesis.txt").exists()
  assert (tmp_path / "weights" / "config.json").exists()


def test_a_teacher_with_another_vocabulary_is_refused(cache, tmp_path, capsys):
  shutil.copytree(ERNIE, tmp_path / "ernie")
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
  (tmp_path / "ernie" / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
  places = ["--output", str(tmp_path / "out"), "--data.cache", str(cache)]
  assert main(["run", TINY, *places, "--model.teacher-start", str(tmp_path / "ernie")]) == 2
  assert "its vocabulary is not the student's" in capsys.readouterr().err


def test_help_and_nothing(capsys):
  assert main(["--help"]) == 0
  assert main([]) == 2
  assert "run CONFIG" in capsys.readouterr().out


def test_every_field_is_a_flag():
  done = subprocess.run([sys.executable, "-m", "ernie_jax", "run", "--help"], capture_output=True, text=True)
  assert done.returncode == 0
  for flag in ("--cascade.weights.kl-ce-li", "--seed", "--fresh", "--model.late-width"):
    assert flag in done.stdout


def test_progress_is_line_wise_without_a_terminal(capsys, monkeypatch):
  monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
  with progress.Progress("encode", 3, "texts") as bar:
    for _ in range(3):
      bar.advance(1, "loss 1")
  printed = capsys.readouterr().err.splitlines()
  assert printed[0].startswith("  encode: 1/3 texts, ")
  assert printed[0].endswith("left, loss 1")
  assert printed[-1] == "  encode: 3 texts in 0:00"


def test_clock():
  assert [progress.clock(s) for s in (0, 59.9, 93.4, 3600, 7384)] == [
    "0:00",
    "0:59",
    "1:33",
    "1:00:00",
    "2:03:04",
  ]


def test_data_shows_what_is_in_a_data_set(tmp_path, capsys):
  files = {name: content.encode() for name, content in sources.msmarco().items()}
  files["collection.tsv"] += b"no columns\n"
  folder, cache = sources.write(tmp_path / "my data", files), tmp_path / "cache"
  args = ["data", "msmarco", "--from", str(folder), "--cache", str(cache), "--query-length", "6"]
  assert main(args) == 2
  printed = capsys.readouterr()
  assert printed.out == ""
  assert "collection.tsv:7: 1 columns, not 2; separate them by tabs; --skip-bad N" in printed.err
  assert not list(cache.rglob("*.array_record*"))
  assert main([*args, "--skip-bad", "1"]) == 0
  printed = capsys.readouterr().out.splitlines()
  data = datasets.load(config.Data("msmarco", str(folder), cache=str(cache), skip_bad=1))
  assert printed[0] == f"msmarco: fingerprint {data.fingerprint}, in {data.summary['folder']}"
  table = {line.split()[0]: line.split()[1:] for line in printed[2:6]}
  assert [table[split][0] for split in ("corpus", *datasets.SPLITS)] == ["6", "10", "1", "3"]
  tokenizer = tokens.Tokenizer.train(data.corpus.passages, 8192)
  lengths = [len(own) for own in tokenizer.encode(data.queries["train"].texts)]
  middle, longest = sorted(lengths)[len(lengths) // 2], max(lengths)
  assert middle == sorted(lengths)[len(lengths) // 2 - 1] > 4
  assert [table["train"][i] for i in (1, 4, 5, 7)] == [str(middle), str(longest), "100.0%", "6"]
  assert table["corpus"][5:] == ["0.0%", "at", "128"]
  assert printed[6] == "negatives of a training query: 2.0, 10 have some"
  assert printed[7:9] == ["skipped: 1 wrong number of columns", "left out: 1 queries without judgements"]
  assert printed[9] == "what is number 0? -> Padding: Zeros around an array, or ones."
  assert len(printed) == 9 + 5 + 1
  # The last line is a command: its flags are the settings of this data set.
  command = shlex.split(printed[-1].removeprefix("next: ernie-jax "))
  flags = {name.removeprefix("--data."): value for name, value in zip(command[2::2], command[3::2])}
  assert command[:2] == ["run", "configs/quickstart.py"]
  assert flags == {
    "name": "msmarco",
    "folder": str(folder),
    "skip-bad": "1",
    "cache": str(cache),
    "query-length": "6",
    "passage-length": "128",
    "--output": "runs/msmarco",
  }


def test_given_negatives_that_are_not_there_are_refused_before_training(tmp_path, capsys):
  folder = sources.write(tmp_path / "in", sources.beir())
  flags = ["--data.name", "beir", "--data.folder", str(folder), "--data.cache", str(tmp_path / "cache")]
  assert main(["run", TINY, "--output", str(tmp_path / "out"), "--mine.use", "both", *flags]) == 2
  assert "mine.use='both': the training queries bring no negatives" in capsys.readouterr().err.splitlines()[-1]


INTERRUPTED = "\nernie-jax: interrupted; give the same command again\n"


def in_a_destructor(interrupt):
  """Where Python drops every exception."""

  class Thing:
    def __del__(self):
      interrupt()

  Thing()
  time.sleep(20)


def in_an_import(interrupt):
  """Where it becomes an error of another type."""
  try:
    interrupt()
  except KeyboardInterrupt as error:
    raise ImportError("initialization failed") from error


@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", [lambda interrupt: interrupt(), in_a_destructor, in_an_import])
def test_an_interruption_is_never_lost(where, number, monkeypatch, capsys):
  def interrupt():
    if number is None and where is not in_an_import:  # there it were an error like any other
      raise KeyboardInterrupt
    signal.raise_signal(number or signal.SIGINT)

  def verb(_):
    command.SIGNALS.take(signal.SIGTERM)
    where(interrupt)

  before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], sys.unraisablehook
  monkeypatch.setitem(command.VERBS, "search", verb)
  assert main(["search"]) == 128 + (number or signal.SIGINT)
  assert capsys.readouterr().err == INTERRUPTED
  assert before == ([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], sys.unraisablehook)


def test_other_errors_that_python_drops_are_shown_as_before(monkeypatch):
  class Thing:
    def __del__(self):
      raise ValueError("unheard")

  seen = []
  monkeypatch.setattr(sys, "unraisablehook", lambda what: seen.append(what.exc_type))
  monkeypatch.setitem(command.VERBS, "search", lambda _: Thing())
  assert main(["search"]) == 0
  assert seen == [ValueError]


@pytest.mark.parametrize("second", [False, True])
def test_a_verb_that_swallows_an_interruption_is_ended(second):
  """At once by a second one, else after a while."""
  code = f"""
    import signal, sys, time
    from ernie_jax import __main__ as command, signals
    signals.GRACE = {60 if second else 0.2}
    def verb(_):
      try:
        signal.raise_signal(signal.SIGINT)
      except:
        print("swallowed")
      if {second}:
        signal.raise_signal(signal.SIGINT)
      time.sleep(20)
    command.VERBS["search"] = verb
    sys.exit(command.main(["search"]))
  """
  done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (130, INTERRUPTED)


def test_ctrl_c_while_the_command_is_imported_is_one_line(tmp_path):
  (tmp_path / "tyro.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
  path = os.pathsep.join([str(tmp_path), str(Path(command.__file__).parent.parent)])
  done = subprocess.run(
    [sys.executable, "-m", "ernie_jax", "--help"], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
  )
  assert (done.returncode, done.stdout, done.stderr) == (130, "", INTERRUPTED)


def test_programs_are_compiled_once_for_all_runs(tmp_path):
  code = """
    import sys
    from ernie_jax import __main__ as command
    def compile(args):
      import jax
      jax.jit(lambda x: x * 3 + 1)(2).block_until_ready()
    command.VERBS["compile"] = compile
    sys.exit(command.main(["compile"]))
  """
  (tmp_path / "file").write_text("")
  env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
  env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  run = lambda home: subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)], env=env | {"HOME": str(home)}, capture_output=True, text=True
  )
  kept = lambda: {path.name for path in (tmp_path / ".cache/ernie_jax/compiled").glob("*-cache")}
  assert (run(tmp_path).returncode, len(kept()) > 0) == (0, True)
  before = kept()
  assert (run(tmp_path).returncode, kept()) == (0, before)
  nowhere = run(tmp_path / "file")  # no folder can be made there
  assert (nowhere.returncode, nowhere.stderr) == (0, "")


def test_a_process_starts_again_for_huge_pages_where_they_are_given_to_who_asks(tmp_path):
  """Once, with the same command and a user's own settings; nowhere else, and not for what is done at once."""
  pages = tmp_path / "enabled"
  code = f"""
    import os, sys, pathlib
    from ernie_jax import __main__ as program
    print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), flush=True)
    if "GONE" in os.environ:
      del os.environ["GLIBC_TUNABLES"]
    program.PAGES = pathlib.Path({str(pages)!r})
    sys.exit(program.command())
  """
  own = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
  asked = "glibc.malloc.hugetlb=1"

  def settings(kind, *args, **more):
    """What each start of the process finds."""
    pages.write_text(kind)
    program = [sys.executable, "-c", textwrap.dedent(code), *args]
    ran = subprocess.run(program, env=own | more, capture_output=True, text=True)
    assert ran.returncode == (0 if "--help" in args else 2)
    lines = [line.split(" ", 1) for line in ran.stdout.splitlines() if str(list(args)) in line]
    assert len({process for process, _ in lines}) == 1
    return [line.removeprefix(f"{list(args)} ") for _, line in lines]

  verb = ["encode", str(tmp_path / "no run"), "--output", str(tmp_path / "out")]
  assert settings("always [madvise] never", *verb) == ["None", asked]
  assert settings("[always] madvise never", *verb) == settings("always madvise [never]", *verb) == ["None"]
  arena = "glibc.malloc.arena_max=1"
  assert settings("always [madvise] never", *verb, GLIBC_TUNABLES=arena) == [arena, f"{arena}:{asked}"]
  assert settings("always [madvise] never", *verb, GLIBC_TUNABLES=f"{asked[:-1]}0") == [f"{asked[:-1]}0"]
  assert settings("always [madvise] never", *verb, GONE="1", GLIBC_TUNABLES=arena) == [arena, asked]
  assert settings("always [madvise] never", "--help") == ["None"]


def test_a_program_that_a_killed_process_kept_by_half_is_dropped(tmp_path, monkeypatch):
  """JAX would keep no other one beside it."""
  monkeypatch.setenv("HOME", str(tmp_path))
  for name in [name for name in os.environ if name.startswith("JAX_COMPILATION")]:
    monkeypatch.delenv(name)
  place = tmp_path / ".cache" / "ernie_jax" / "compiled"
  place.mkdir(parents=True)
  for name in ("whole-cache", "whole-atime", "half-cache", "young-cache"):
    (place / name).write_bytes(b"")
  for name in ("whole-cache", "half-cache"):
    os.utime(place / name, (0, 0))
  command.keep_compiled()
  assert {path.name for path in place.iterdir()} == {"whole-cache", "whole-atime", "young-cache"}
