"""Writing files: an error or a kill leaves the old file or the new one, one process at a time writes in a directory,
and errors name the file that was being written."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import refqlora as rq
from refqlora.files import writing
from refqlora.files.reading import read_json, read_tensors

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(rq.__file__).parent.parent)}
PRELUDE = """
import os, sys, time
from pathlib import Path
import numpy as np
from refqlora.files import writing
out = Path(sys.argv[1])
"""


def child(program, *arguments, **options):
    command = [sys.executable, "-c", PRELUDE + program, *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Cut(Exception):
    pass


def cut(*args):
    raise Cut


# ---- one file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_an_error_in_the_middle_leaves_the_old_file(tmp_path, monkeypatch, function):
    writing.write_json(tmp_path / "a.json", {"old": 1})
    writing.write_tensors(tmp_path / "a.safetensors", {"a": np.ones(3)})
    before = contents(tmp_path)
    monkeypatch.setattr(os, function, cut)
    with pytest.raises(Cut):
        writing.write_json(tmp_path / "a.json", {})
    with pytest.raises(Cut):
        writing.write_tensors(tmp_path / "a.safetensors", {"a": np.zeros(3)})
    assert contents(tmp_path) == before


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    writing.write_json(tmp_path / "a.json", {"old": 1})
    before = contents(tmp_path)
    with pytest.raises(TypeError):
        writing.write_json(tmp_path / "a.json", {"a": object()})
    with pytest.raises(ValueError, match=r"a\.safetensors: x: expected one of float64, .*, got complex128"):
        writing.write_tensors(tmp_path / "a.safetensors", {"x": np.zeros(3, complex)})
    assert contents(tmp_path) == before


def test_a_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").touch()
    writing.write_json(tmp_path / "a.json", {})
    writing.write_tensors(tmp_path / "a.safetensors", {})
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_directory_is_put_on_the_disk_after_a_rename(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(os.readlink(f"/proc/self/fd/{number}")))
    monkeypatch.setattr(os, "replace", lambda a, b, replace=os.replace: (calls.append("rename"), replace(a, b)))
    writing.write_bytes(tmp_path / "a", b"x")
    assert [Path(call).name for call in calls] == ["a", "rename", tmp_path.name]


# ---- several files ---------------------------------------------------------------------------------------------


def write_both(directory, value):
    with writing.together(directory, last="config.json", instead_of=["*.old"]) as new:
        writing.write_tensors(new / "a.safetensors", {"a": np.full(3, value)})
        writing.write_json(new / "config.json", {"value": value})


def read_both(directory):
    return read_json(directory / "config.json")["value"], dict(read_tensors(directory / "a.safetensors"))["a"][0]


@pytest.mark.parametrize("by", ["error", "kill"])
def test_stopped_at_any_step_two_files_are_never_mixed(tmp_path, monkeypatch, by):
    """Old, new, or without the config: after each file operation of putting them in place, in turn."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    seen, step, done = set(), 0, False
    while not done:
        place = tmp_path / str(step)
        write_both(place, 1)
        (place / "b.old").touch()
        left = step

        def stopped(function):
            def call(*args, **options):
                nonlocal left
                left -= 1
                if left < 0:
                    raise (Cut if by == "error" else KeyboardInterrupt)
                return function(*args, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopped(os.replace))
            patch.setattr(Path, "unlink", stopped(Path.unlink))
            if by == "kill":  # what is not caught, nor cleared away
                patch.setattr(writing.shutil, "rmtree", lambda *args, **options: None)
            try:
                write_both(place, 2)
                done = True
            except (Cut, KeyboardInterrupt):
                pass
        try:
            found = read_both(place)
        except FileNotFoundError as error:
            assert "config.json" in str(error)  # noqa: PT017
            found = None
        seen.add(found)
        write_both(place, 3)
        assert read_both(place) == (3, 3)
        assert set(contents(place)) == {"a.safetensors", "config.json"}
        step += 1
    assert seen == {(1, 1), None, (2, 2)}


def test_ctrl_c_between_the_renames_lets_them_end(tmp_path, monkeypatch):
    write_both(tmp_path, 1)
    replace, times = os.replace, []

    def interrupted(a, b):
        replace(a, b)
        times.append(b)
        if len(times) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_both(tmp_path, 2)
    assert read_both(tmp_path) == (2, 2)


def test_an_error_in_the_block_leaves_the_directory_as_it_was(tmp_path):
    for before in (False, True):
        directory = tmp_path / str(before)
        if before:
            write_both(directory, 1)
        with pytest.raises(ZeroDivisionError), writing.together(directory, last="config.json") as new:
            (new / "config.json").write_text("new" * (1 // 0))
        assert directory.exists() == before
    assert read_both(directory) == (1, 1)
    assert set(contents(directory)) == {"a.safetensors", "config.json"}


def test_a_new_directory(tmp_path):
    for name in ("new", "empty", "new/../other"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with writing.new_directory(tmp_path / name) as new:
            (new / "config.json").write_text("{}")
            (new / "by hand").write_text("x")
        assert set(contents(tmp_path / name)) == {"config.json", "by hand"}
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "none")
    for name, found in {"new": "one with files in it", "file": "a file", "link": "a link to nothing"}.items():
        with pytest.raises(ValueError, match="expected") as error, writing.new_directory(tmp_path / name):
            pytest.fail("the block runs")
        assert str(error.value) == f"{tmp_path / name}: expected a new or empty directory, got {found}"


# ---- two processes ---------------------------------------------------------------------------------------------


def test_one_process_at_a_time(tmp_path):
    """The second is refused at once; after the first was killed, nothing is in the way and what it left is gone."""
    out = tmp_path / "out"
    first = child("with writing.together(out) as new:\n    print(new, flush=True); time.sleep(600)", out)
    staging = Path(first.stdout.readline().strip())
    assert staging.parent == out
    start = time.monotonic()
    for write in (write_both, lambda path, _: writing.write_json(path / "x.json", {})):
        with pytest.raises(ValueError, match="another process") as error:
            write(out, 1)
        assert str(error.value) == f"{out}: another process is writing here"
    with pytest.raises(ValueError, match="another process"), writing.new_directory(out):
        pass
    assert time.monotonic() - start < 60
    assert staging.is_dir()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert staging.is_dir()
    write_both(out, 1)
    assert set(contents(out)) == {"a.safetensors", "config.json"}
    assert not staging.exists()


def test_of_many_processes_on_one_new_directory_one_writes_it(tmp_path):
    program = """
number = sys.argv[2]
time.sleep(max(0, float(sys.argv[3]) - time.time()))
try:
    with writing.new_directory(out) as new:
        for i in range(20):
            (new / str(i)).write_text(number)
        (new / "config.json").write_text(number)
except ValueError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""
    for turn in range(3):
        out = tmp_path / str(turn)
        at = time.time() + 3
        children = [child(program, out, number, at) for number in range(5)]
        ends = [(process.communicate()[1], process.returncode) for process in children]
        winners = [i for i, (_, code) in enumerate(ends) if code == 0]
        assert len(winners) == 1, ends
        assert contents(out) == {name: str(winners[0]).encode() for name in (*map(str, range(20)), "config.json")}
        for said, code in ends:
            if code:
                assert re.fullmatch(rf"{out}: (another process is|expected a new or empty directory).*\n", said)


def test_a_lock_within_a_lock_is_one_and_another_thread_is_refused(tmp_path):
    said = []

    def other():
        try:
            writing.write_bytes(tmp_path / "x", b"")
        except ValueError as error:
            said.append(str(error))

    with writing.locked(tmp_path):
        with writing.locked(tmp_path / "." / "../" / tmp_path.name):
            writing.write_bytes(tmp_path / "a", b"")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert said == [f"{tmp_path}: another process is writing here"]
    assert set(contents(tmp_path)) == {"a"}
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert set(contents(tmp_path)) == {"a", "x"}


def test_a_system_without_locks_still_writes(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / ".refqlora-aaaaaaaa").mkdir()  # perhaps another process's, which would show in no lock
    write_both(tmp_path, 1)
    assert read_both(tmp_path) == (1, 1)
    assert (tmp_path / ".refqlora-aaaaaaaa").is_dir()


@pytest.mark.parametrize(
    "name", [".out.tmp", ".config.json.tmp", ".refqlora-mine", ".refqlora-notes.txt", "config.tmp"]
)
def test_what_a_user_calls_temporary_survives(tmp_path, name):
    for directory in (tmp_path, tmp_path / "out"):
        (directory / name).mkdir(parents=True)
        (directory / name / "mine").touch()
    write_both(tmp_path / "out", 1)
    writing.write_json(tmp_path / "config.json", {})
    assert (tmp_path / name / "mine").is_file()
    assert (tmp_path / "out" / name / "mine").is_file()


# ---- errors ----------------------------------------------------------------------------------------------------


def full(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, function):
    monkeypatch.setattr(os, function, full)
    for name, write in {
        "a.json": lambda path: writing.write_json(path, {}),
        "a.safetensors": lambda path: writing.write_tensors(path, {"a": np.zeros(3)}),
    }.items():
        with pytest.raises(OSError, match="space") as error:
            write(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name}: No space left on device"
        assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="space") as error:
        write_both(tmp_path / "out", 1)
    assert str(error.value) == f"{tmp_path}/out/a.safetensors: No space left on device"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="limits as POSIX has them")
def test_the_system_s_own_refusal_names_the_file(tmp_path):
    """A limit on the size of files stands in for a full disk: the writes themselves fail."""
    program = """
import resource
from refqlora.files import model_files
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
x = np.zeros(9999)
for write in (
    lambda: writing.write_tensors(out / "a.safetensors", {"a": x}),
    lambda: writing.write_bytes(out / "a.bin", bytes(9999)),
    lambda: writing.copy_file(Path(sys.executable), out / "copy"),
):
    try:
        write()
    except OSError as error:
        print(error)
try:
    with writing.new_directory(out / "model") as new:
        model_files.write_model(new, [("a", x)])
except OSError as error:
    print(error)
"""
    process = child(program, tmp_path)
    said, fault = process.communicate()
    files = ("a.safetensors", "a.bin", "copy", "model/model.safetensors")
    assert said.splitlines() == [f"{tmp_path / file}: File too large" for file in files], fault
    assert contents(tmp_path) == {}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError) as error:
        writing.write_json(tmp_path / "a.json", {})
    assert str(error.value) == f"{tmp_path}: Permission denied"
