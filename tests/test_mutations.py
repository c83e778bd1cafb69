"""Mutated files, options and calls: each works or is refused in one line. `python tests/mutations.py` tries more."""

import os
import random
import shutil
import time
from functools import partial

import mutations
import numpy as np
import odd_calls
import pytest
from refusals import OUT, Case, judge, judge_all

import refqlora as rq
from refqlora.functional import softcap_forward


def test_what_is_mutated_works_or_is_refused_in_one_line():
    results = mutations.run(mutations.sample(300), seed=0)
    assert [result for result in results if result.ended == "FAILED"] == []
    assert {result.kind for result in results if result.ended == "refused"} == mutations.KINDS.keys()
    assert {result.kind for result in results if result.ended == "success"} == mutations.KINDS.keys()


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    path = tmp_path_factory.mktemp("valid")
    mutations.build(path)
    return path


@pytest.mark.parametrize("kind", mutations.KINDS)
def test_a_case_is_a_function_of_seed_kind_and_number(kind, valid, tmp_path):
    said = []
    for home, seed in (("first", 5), ("second", 5), ("third", 6)):
        (tmp_path / home).mkdir()
        case = mutations.KINDS[kind](random.Random(seed), valid, tmp_path / home)
        said.append(case.said.replace(str(tmp_path / home), ""))
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(("kind", "way"), [(kind, way) for kind in mutations.FILES for way in mutations.FILES[kind][3]])
def test_files_that_are_not_mutated_are_taken(kind, way, valid, tmp_path, monkeypatch):
    for model in mutations.FILES[kind][0]:
        home = tmp_path / model
        home.mkdir()
        monkeypatch.setitem(mutations.FILES, kind, ([model], mutations.FILES[kind][1], [lambda rng, path: ""], [way]))
        assert judge(mutations.of_files(kind, random.Random(0), valid, home), home) == ("success", ""), model


@pytest.mark.parametrize("command", mutations.USUAL)
def test_options_that_are_not_mutated_are_taken(command, valid, tmp_path, monkeypatch):
    monkeypatch.setattr(mutations, "WORDS", [""])
    case = mutations.of_options(random.Random(0), valid, tmp_path)
    argv = [f"{option}={x}" if option.startswith("--") else x for option, x in mutations.USUAL[command].items()]
    assert judge(case._replace(use=partial(mutations.begin, 3, command, *argv)), tmp_path) == ("success", "")


def test_calls_that_are_not_mutated_are_taken(valid, tmp_path):
    shutil.copytree(valid / "models/plain", tmp_path / "model")
    shutil.copytree(valid / "beside/adapter", tmp_path / "adapter")
    for name in odd_calls.calls(tmp_path):
        call, arguments = odd_calls.calls(tmp_path)[name]
        assert judge(Case(name, partial(call, **arguments), []), tmp_path) == ("success", ""), name


PLANTED = {  # what a case may do, and what is said of it
    "works": (lambda home: None, "success", ""),
    "writes": (lambda home: (home / OUT).write_text("new"), "success", ""),
    "refuses": (lambda home: rq.quantize(np.ones(64, int)), "refused", "tensor: dtype: expected"),
    "another error": (lambda home: {}["x"], "FAILED", "KeyError: 'x'"),
    "not ours": (lambda home: int("x"), "FAILED", "not raised on purpose by refqlora: names nothing of what was given"),
    "an accident": (lambda home: softcap_forward(None, 1), "FAILED", "not raised on purpose"),
    "names nothing": (lambda home: rq.normal_float(99), "FAILED", "names nothing of what was given: "),
    "not an exception": (lambda home: exit(), "FAILED", "SystemExit"),
    "too much memory": (lambda home: bytearray(1 << 40), "FAILED", "MemoryError"),
    "hangs": (lambda home: time.sleep(99), "FAILED", "hangs: not done after 1 seconds"),
    "dies": (lambda home: os._exit(1), "FAILED", "the process died"),
    "spoils": (lambda home: (home / "given").write_text("new"), "FAILED", "changes or leaves given"),
}


def planted(kind, rng, valid, home):
    (home / "given").write_text("old")
    return Case(kind, partial(PLANTED[kind][0], home), ["tensor"])


def test_each_end_of_a_case_is_told(tmp_path):
    kinds = {kind: partial(planted, kind) for kind in PLANTED}
    for result in judge_all(kinds, [(kind, 0) for kind in kinds], 0, tmp_path, limit=1):
        _, ended, message = PLANTED[result.kind]
        assert (result.ended, result.message[: len(message)]) == (ended, message), result
