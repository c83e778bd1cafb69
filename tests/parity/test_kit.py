"""`refqlora parity --against`: a right kernel passes, and a wrong one's mistake or fault is named."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from refqlora.blockwise import BLOCK_SIZES
from refqlora.commands import main
from refqlora.parity.differences import relative_difference, ulps
from refqlora.parity.kit import mistakes
from refqlora.parity.kit.diagnosis import LORA_BOUND, MISTAKES, Trial, explain, positions
from refqlora.parity.kit.examine import FUNCTIONS, examine, load_kernel, offered
from refqlora.parity.kit.trials import trials

KERNELS = Path(__file__).parent / "kernels"
sys.path.insert(0, str(KERNELS))
import right  # noqa: E402
import wrong  # noqa: E402

EXACT = tuple(MISTAKES)


def report(function, kernel):
    return examine(SimpleNamespace(**{function: kernel}), function, size=2000)


def only(function, kernel):
    """The findings, of which there must be some."""
    findings = report(function, kernel).findings
    assert findings
    return findings


# ---- right and wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_right_kernel_is_right(function):
    found = examine(right, function, seed=5)
    assert found.findings == ()
    assert found.calls >= 6
    assert [line.endswith("OK") for line in found.lines()] == [True]


@pytest.mark.parametrize("name", wrong.KERNELS)
def test_the_mistake_of_a_wrong_kernel_is_found(name):
    kernel, cause = wrong.KERNELS[name]
    for function in offered(kernel):
        findings = examine(kernel, function).findings
        assert findings
        for finding in findings:
            assert cause in finding.cause, str(finding)


@pytest.mark.parametrize("function", EXACT)
def test_the_definition_is_right(function):
    """The diagnosis's own definition, written apart from the engine, against the vectors and the engine."""
    assert report(function, getattr(mistakes, function)).findings == ()


@pytest.mark.parametrize("function", EXACT)
def test_every_mistake_that_is_known_is_found_and_named(function):
    for cause, changes in MISTAKES[function]:

        def kernel(*arguments, changes=changes):
            return getattr(mistakes, function)(*arguments, **changes)

        assert {finding.cause for finding in only(function, kernel)} == {cause}, cause


def test_what_is_unknown_is_said_to_be():
    def random(w, block_size):
        packed, absmax = right.quantize(w, block_size)
        return packed ^ np.random.default_rng(0).integers(0, 256, packed.shape).astype(np.uint8), absmax

    findings = only("quantize", random)
    assert {finding.cause for finding in findings} == {""}
    assert str(findings[0]).endswith("no known cause fits")


def test_most_of_a_mistake_is_said_to_be_most():
    """Swapped nibbles, and one element changed besides."""

    def kernel(w, block_size):
        packed, absmax = mistakes.quantize(w, block_size, low_first=True)
        packed[0] ^= 16
        return packed, absmax

    causes = {finding.cause for finding in only("quantize", kernel)}
    assert any(cause.startswith("mostly this: the two codes of a byte are swapped") for cause in causes)


def test_one_cause_is_not_read_into_calls_that_nearly_anything_explains():
    """Zeros that come out wrong are no sign of a table; nor is a single code."""

    def kernel(w, block_size):
        packed, absmax = right.quantize(w, block_size)
        return packed ^ (0x88 if w.size < 130 else 0x9), absmax

    causes = {finding.case: finding.cause for finding in only("quantize", kernel)}
    assert causes["zeros"] == causes["one"] == ""


def test_a_process_that_flushes_subnormal_numbers_is_not_taken_for_the_kernel_s_mistake():
    """Then the diagnosis's own arithmetic flushes them as well: it gives the kernel's result, not the vectors'."""
    zeros = next(trial for trial in trials("quantize") if trial.case == "zeros")
    packed, absmax = mistakes.quantize(*zeros.arguments)
    zeros.expected, zeros.found = {"packed": packed ^ 0x77, "absmax": absmax}, {"packed": packed, "absmax": absmax}
    tie = next(trial for trial in trials("quantize") if trial.case == "ties nf4")
    tie.found = dict(zip(tie.expected, mistakes.quantize(*tie.arguments, tie="up"), strict=True))
    causes = explain([zeros, tie])
    assert "flushes subnormal numbers" in causes[0]
    assert "a tie goes up" in causes[1]


# ---- where and what ----------------------------------------------------------------------------------------


def test_a_finding_says_where():
    kernel, _ = wrong.KERNELS["ties up"]
    ties = next(finding for finding in examine(kernel, "quantize").findings if finding.case == "ties nf4")
    assert ties.what == "118 of 512 codes differ, first at 0: got 1, expected 0"
    assert str(ties) == f"quantize · ties nf4 · {ties.what} · likely cause: {ties.cause}"


def test_units_in_the_last_place():
    one = np.float32(1)
    above, below = np.nextafter(one, np.float32(2)), np.nextafter(one, np.float32(0))
    assert ulps(
        [one, one, above, 0.0, -1e-45, np.inf], [one, above, below, -0.0, 1e-45, np.finfo(np.float32).max]
    ).tolist() == [0, 1, 2, 0, 2, 1]
    kernel, _ = wrong.KERNELS["multiply-add"]
    what = examine(kernel, "dequantize_constants").findings[0].what
    assert what.startswith(
        "63 of 1,000 absmax differ, by 1 in the last place, first at 5: got 0.040348332, expected 0.04034833"
    )


def test_a_finding_of_lora_names_the_sizes():
    """So that those in an error can be read."""
    kernel, _ = wrong.KERNELS["B not transposed"]
    finding = next(f for f in examine(kernel, "lora_forward").findings if f.case.startswith("ordinary"))
    assert finding.case == "ordinary (N = 7, in = 12, out = 10, r = 3)"
    assert "size 10 is different from 3" in finding.what


def test_a_finding_of_lora_says_by_how_much():
    kernel, _ = wrong.KERNELS["no scale"]
    what = examine(kernel, "lora_forward").findings[0].what
    assert "y is off by " in what
    assert "(bound 1e-05), most at (" in what


def test_every_element_counts():
    """One code, one absmax, one weight, one gradient: off in its last bit alone it is found."""

    def code(w, block_size):
        packed, absmax = right.quantize(w, block_size)
        packed[-1] ^= 1
        return packed, absmax

    def constant(w, block_size):
        packed, absmax = right.quantize(w, block_size)
        absmax[-1] = np.nextafter(absmax[-1], np.float32(np.inf))
        return packed, absmax

    def weight(*arguments):
        weights = right.dequantize(*arguments)
        weights.reshape(-1)[-1] = np.nextafter(weights.reshape(-1)[-1], np.float32(np.inf))
        return weights

    def gradient(*arguments):
        dx, dA, dB = right.lora_backward(*arguments)
        dA[-1, -1] += 2 * LORA_BOUND * max(np.abs(dA).max(), 1)
        return dx, dA, dB

    cases = {"quantize": code, "dequantize": weight, "lora_backward": gradient}
    for function, kernel in [*cases.items(), ("quantize", constant)]:
        found = report(function, kernel)
        assert len(found.findings) >= found.calls - 2, function  # a zero one bit up is a tiny number, and allowed


# ---- faults ------------------------------------------------------------------------------------------------


def raises(*_):
    raise RuntimeError("no such device")


def in_place(w, block_size):
    made = right.quantize(w, block_size)
    w[...] = 0
    return made


FAULTS = {
    "exits": (lambda w, b: sys.exit(3), "raised SystemExit: 3"),
    "another signature": (lambda w: None, "raised TypeError: "),
    "raises": (raises, "raised RuntimeError: no such device"),
    "in place": (in_place, "its argument 1 is changed"),
    "one value": (lambda w, b: right.quantize(w, b)[0], "returned 1 values, expected (packed, absmax)"),
    "nothing": (lambda w, b: None, "returned 1 values"),
    "int8": (lambda w, b: (right.quantize(w, b)[0].view(np.int8), right.quantize(w, b)[1]), "packed is int8, expected"),
    "double": (lambda w, b: (right.quantize(w, b)[0], right.quantize(w, b)[1].astype(float)), "absmax is float64"),
    "a column": (lambda w, b: (right.quantize(w, b)[0][:, None], right.quantize(w, b)[1]), "packed has shape ("),
    "objects": (lambda w, b: (["x", None], None), "packed is list, expected an array"),
    "ragged": (lambda w, b: ([[1], [1, 2]], None), "packed is not an array"),
    "unpacked": (lambda w, b: (np.zeros(w.size, np.uint8), right.quantize(w, b)[1]), "packed has shape ("),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_case(fault):
    kernel, words = FAULTS[fault]
    findings = only("quantize", kernel)
    assert any(words in finding.what for finding in findings), [str(f) for f in findings]
    assert all("\n" not in str(finding) for finding in findings)


def stacks(x, W, A, B, scale):
    return np.stack([x, W])


def test_a_crash_names_file_and_line():
    """Of the kernel, also where NumPy raised it."""
    for function, kernel in (("quantize", raises), ("lora_forward", stacks)):
        line = kernel.__code__.co_firstlineno + 1
        assert only(function, kernel)[0].what.endswith(f" ({__file__}, line {line})")
    assert only("quantize", len)[0].what.endswith("(2 given)")  # a function without lines


def test_causes_of_wrong_shapes():
    unpacked = [f for f in only("quantize", FAULTS["unpacked"][0]) if f.case != "one"]
    assert {finding.cause for finding in unpacked} == {"two codes go into a byte"}
    column = only("quantize", FAULTS["a column"][0])
    assert all(finding.cause.startswith("it must be reshaped") for finding in column)

    def transposed(*arguments):
        dx, dA, dB = right.lora_backward(*arguments)
        return dx, dA.T, dB

    assert {finding.cause for finding in only("lora_backward", transposed)} == {"dA is transposed"}


def test_what_a_kernel_does_not_take_is_left_out():
    def kernel(w, block_size):
        assert block_size in (64, 128)
        assert w.dtype == np.float32
        return right.quantize(w, block_size)

    limited = SimpleNamespace(quantize=kernel, BLOCK_SIZES=(64, 128), DTYPES=(np.float32,))
    found = examine(limited, "quantize")
    assert found.findings == ()
    assert 10 < found.calls < examine(right, "quantize").calls


def test_the_calls_have_every_block_size_dtype_and_layout():
    calls = trials("quantize")
    assert {trial.arguments[1] for trial in calls} == set(BLOCK_SIZES)
    assert {trial.arguments[0].dtype.name for trial in calls} == {"float32", "float16", "bfloat16"}
    assert any(not trial.arguments[0].flags.c_contiguous for trial in calls)
    assert any(trial.arguments[0].size % 2 for trial in calls)
    assert any(trial.arguments[0].shape[-1] % trial.arguments[1] for trial in calls if trial.arguments[0].ndim > 1)


def test_a_zero_block_s_absmax_may_be_the_least_divisor():
    zero, least = np.zeros(1, np.float32), np.float32([1e-38])
    assert not len(positions("absmax", zero, least))
    assert len(positions("absmax", zero, np.float32([1e-37])))
    assert len(positions("weights", zero, least))


def test_the_vectors_of_lora_are_what_autograd_says_of_the_formula():
    for function in ("lora_forward", "lora_backward"):
        for trial in trials(function):
            made = getattr(right, function)(*(np.float64(argument) for argument in trial.arguments))
            made = made if isinstance(made, tuple) else (made,)
            for name, x in zip(trial.expected, made, strict=True):
                assert relative_difference(x, trial.expected[name]) < 1e-7


def test_nothing_wrong_needs_no_explanation():
    x = {"packed": np.zeros(1, np.uint8), "absmax": np.zeros(1, np.float32)}
    assert explain([Trial("quantize", "case", (), x, dict(x))]) == {}


# ---- the command -------------------------------------------------------------------------------------------


def test_the_command_on_a_file(capsys):
    assert main(["parity", "--against", str(KERNELS / "right.py"), "--size", "2000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" · ")[0] for line in lines[: len(FUNCTIONS)]] == list(FUNCTIONS)
    assert lines[-1] == "OK"


WRONG = "from right import quantize as q\ndef quantize(w, b):\n    p, a = q(w, b)\n    print('hello')\n"


def test_the_command_on_a_wrong_kernel(tmp_path, capsys):
    (tmp_path / "swapped.py").write_text(f"{WRONG}    return p << 4 | p >> 4, a\n")
    arguments = ["parity", "--against", str(tmp_path / "swapped.py"), "--size", "500"]
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "likely cause: the two codes of a byte are swapped" in out
    assert "hello" not in out
    assert "not offered: dequantize, " in out
    assert out.endswith("WRONG: quantize\n")
    assert main([*arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert found["lines"][0]["function"] == "quantize"
    assert "swapped" in found["lines"][0]["findings"][0]["cause"]


def test_the_command_on_a_dotted_name(tmp_path):
    """As it is typed: the working directory is where modules are found."""
    package = tmp_path / "pack"
    package.mkdir()
    (package / "kernel.py").write_text((KERNELS / "right.py").read_text())
    program = "import sys; from refqlora.commands import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "parity", "--against", "pack.kernel", "--only", "lora_forward"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "lora_forward · 6 calls · relative 1e-05 · OK"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("def nothing(): pass", "expected any of the functions quantize, dequantize"),
        ("quantize = 3", "expected any of the functions"),
        ("from right import *\nBLOCK_SIZES = 64", "BLOCK_SIZES: expected a tuple of some of 32, 64, 128, "),
        ("from right import *\nBLOCK_SIZES = (3,)", "got (3,)"),
        (
            "from right import *\nDTYPES = 'float32'",
            "DTYPES: expected a tuple of some of float32, float16, bfloat16, got",
        ),
        ("from right import *\nDTYPES = ('no',)", "got ('no',)"),
        ("import no_such_module_at_all", "cannot be imported: ModuleNotFoundError"),
        ("def f(:", "cannot be imported: SyntaxError"),
        ("exit(0)", "cannot be imported: SystemExit"),
        ("\n1 / 0", "cannot be imported: ZeroDivisionError: division by zero (KERNEL, line 2)"),
        (None, "no such file"),
    ],
)
def test_a_module_that_cannot_be_used(content, words, tmp_path, capsys):
    path = tmp_path / "kernel.py"
    if content is not None:
        path.write_text(content)
    assert main(["parity", "--against", str(path)]) == 2
    error = capsys.readouterr().err
    assert words.replace("KERNEL", str(path)) in error
    assert error.count("\n") == 1


def test_a_name_that_is_no_module(capsys):
    assert main(["parity", "--against", "no_such_module_at_all"]) == 2
    assert "cannot be imported" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot be imported"):
        load_kernel("")


def test_only_a_function_that_there_is(capsys):
    assert main(["parity", "--against", str(KERNELS / "right.py"), "--only", "quantise"]) == 2
    error = capsys.readouterr().err
    assert "--only: expected one of quantize, " in error
    assert "got 'quantise'" in error
