"""Cases that must work or be refused in one line: how they are judged, in processes that are killed when they hang."""

import io
import linecache
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import refqlora
from refqlora import commands

try:
    import resource
except ImportError:  # not on Windows
    resource = None

PACKAGE = str(Path(refqlora.__file__).parent)
LONGEST = 1000  # characters of a refusal
MEMORY = 3 << 30  # bytes of address space that a worker may take
OUT = "out"  # the directory in which a case may change what was there


class Case(NamedTuple):
    """`said` tells the mutation, `use()` uses what was mutated; a refusal must have one of `names` in it."""

    said: str
    use: Callable[[], object]
    names: Collection[str]


class Result(NamedTuple):
    kind: str
    number: int
    said: str
    ended: str  # "success", "refused" or "FAILED"
    message: str  # of the refusal; what is wrong
    seconds: float


class Begun(BaseException):
    """The command has done all its checks, and begins the work."""


class Refused(Exception):
    """A command has ended with this line."""


class _Stderr(io.StringIO):
    """Keeps the error that was being handled when something was last written: that of which a command tells."""

    error: BaseException | None = None

    def write(self, text: str) -> int:
        self.error = sys.exc_info()[1] or self.error
        return super().write(text)


def command(*argv: object) -> None:
    """`refqlora argv`, in this process. Raises Refused from the error that ended it."""
    stderr = _Stderr()
    with redirect_stdout(io.StringIO()), redirect_stderr(stderr), mock.patch("sys.stdin", io.StringIO("mill\n")):
        try:
            code = commands.main([str(word) for word in argv])
        except SystemExit as end:  # argparse's; the error that it stems from is its own
            code, stderr.error = end.code, None
    lines = stderr.getvalue().splitlines()
    if code not in (0, None) and lines:
        notes = all(line.startswith("refqlora ") for line in lines)  # that came before
        raise Refused(lines[-1] if notes else "\n".join(lines)) from stderr.error
    assert code in (0, None, 1), f"exit code {code} without a word"


def faults(error: BaseException, names: Collection[str]) -> list[str]:
    """What keeps this error from being a proper refusal."""
    found, message = [], str(error)
    repeated = next((name for name in names if "\n" in name), "\0")  # given as two lines, and told as it is
    cause = error.__cause__ if isinstance(error, Refused) else error
    system = isinstance(cause, OSError) and cause.filename is not None  # whoever raised it: it names the file
    told = cause.__context__ if cause is not None else None  # another's, of which ours only tells
    accident = isinstance(told, TypeError | ArithmeticError | LookupError | AttributeError) and not _deliberate(told)
    if accident and str(told) in message and "chat template" not in message:  # one fails with words of its own
        found.append(f"tells of a {type(told).__name__}:")
    if isinstance(cause, MemoryError) or (cause is not None and not system and not _deliberate(cause)):
        found.append("not raised on purpose by refqlora:")
    if "\n" in message.replace(repeated, "") or not message:
        found.append("not one line:")
    if len(message) > LONGEST and not system:
        found.append(f"{len(message)} characters:")
    if not any(name in message for name in names):
        found.append("names nothing of what was given:")
    return found


def _deliberate(error: BaseException) -> bool:
    """Whether a `raise` in refqlora raised it, and not NumPy, a library or the interpreter."""
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    file = frame.f_code.co_filename
    return file.startswith(PACKAGE) and linecache.getline(file, line).strip().startswith("raise")


def judge(case: Case, home: Path) -> tuple[str, str]:
    """How the case ends, and the message: of the refusal, or what is wrong with it."""
    before = _contents(home)
    try:
        with chdir(home), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.use()
        ended, message, found = "success", "", []
    except Begun:
        ended, message, found = "success", "", []
    except (ValueError, TypeError, OSError, FloatingPointError, Refused) as error:
        ended, message, found = "refused", str(error), faults(error, case.names)
        if found:
            message = f"{message[:LONGEST]}\n{_where(error.__cause__ or error)}"
    except BaseException as error:
        ended, message = "FAILED", f"{str(error)[:LONGEST]}\n{_where(error.__cause__ or error)}"
        found = [f"{type(error).__name__}:"]
    after = _contents(home)
    changed = [path for path in before.keys() | after if before.get(path) != after.get(path)]
    if ended == "success" or message.startswith("step "):  # what is new is its output
        changed = [path for path in changed if (path in before and path.parts[0] != OUT) or "tmp" in path.name]
    if changed:
        found.append(f"changes or leaves {', '.join(sorted(map(str, changed)))}:")
    return ("FAILED", " ".join([*found, message])) if found else (ended, message)


def _where(error: BaseException) -> str:
    return "".join(traceback.format_tb(error.__traceback__)[-4:])


def _contents(home: Path) -> dict[Path, bytes]:
    return {path.relative_to(home): path.read_bytes() for path in home.rglob("*") if path.is_file()}


# ---- workers -----------------------------------------------------------------------------------------------


Kind = Callable[[random.Random, Path, Path], Case]  # (rng, the valid files, an empty directory) -> a case in it


def _work(connection, kinds: dict[str, Kind], seed: int, valid: Path) -> None:
    """Judge one case after the other: (kind, number) comes in; what it does, and then how it ended, go out."""
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    silence = os.open(os.devnull, os.O_WRONLY)  # Rust tells of its panics by itself
    os.dup2(silence, 1), os.dup2(silence, 2)
    while job := connection.recv():
        kind, number = job
        with tempfile.TemporaryDirectory() as home:
            try:
                case = kinds[kind](random.Random(f"{seed} {kind} {number}"), valid, Path(home))
            except Exception as error:
                case = Case("cannot be made", partial(_raise, error), ())
            connection.send((case.said,))
            connection.send(judge(case, Path(home)))


def _raise(error: Exception) -> None:
    raise AssertionError(f"{type(error).__name__}: {error}") from error


def judge_all(
    kinds: dict[str, Kind], cases: Iterable[tuple[str, int]], seed: int, valid: Path, jobs: int = 2, limit: float = 30
) -> list[Result]:
    """Each case in one of `jobs` processes. One that takes more than `limit` seconds has failed, and its process is
    killed. A case is a function of the seed, its kind and its number."""
    context = multiprocessing.get_context("spawn")
    waiting, results = iter(list(cases)), []

    def watch() -> None:
        worker, connection = None, None
        for kind, number in waiting:
            if worker is None:
                connection, theirs = context.Pipe()
                worker = context.Process(target=_work, args=(theirs, kinds, seed, valid), daemon=True)
                worker.start()
                theirs.close()
            said, start = "?", time.monotonic()
            connection.send((kind, number))
            try:
                (said,) = _answer(connection, 60)  # the process is starting, perhaps
                start = time.monotonic()
                ended, message = _answer(connection, limit)
            except (EOFError, ConnectionError, TimeoutError) as error:
                worker.kill()
                worker = None
                ended, message = "FAILED", str(error) or "the process died"
            results.append(Result(kind, number, said, ended, message, time.monotonic() - start))
        if worker is not None:
            connection.send(None)
            worker.join()

    # Temporary files are put where the caller clears them away: those of a killed process too.
    settings = {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with mock.patch.dict(os.environ, {**settings, "TMPDIR": str(valid)}), ThreadPoolExecutor(jobs) as pool:
        for watching in [pool.submit(watch) for _ in range(jobs)]:
            watching.result()
    return sorted(results)


def _answer(connection, limit: float) -> tuple:
    if not connection.poll(limit):
        raise TimeoutError(f"hangs: not done after {limit:g} seconds")
    return connection.recv()
