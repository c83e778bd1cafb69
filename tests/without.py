"""Programs run where some modules do not exist, or no thread can be started: as in a browser, say."""

import subprocess
import sys

WITHOUT = """
import sys, _thread, threading

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

def no_thread(*_):
    raise RuntimeError("can't start new thread")

sys.meta_path.insert(0, Without())
if {threadless}:  # as in a browser
    _thread.start_new_thread = threading._start_new_thread = threading.Thread.start = no_thread
"""


def run(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def attempt(blocked, program, threadless=False):
    """The finished process of a program that cannot import the modules `blocked`, and perhaps can start no thread."""
    return run(WITHOUT.format(blocked=set(blocked), threadless=threadless) + program)


def run_without(blocked, program, threadless=False):
    """What such a program printed."""
    done = attempt(blocked, program, threadless)
    assert done.returncode == 0, done.stderr
    return done.stdout
