"""Every picture is drawn by one command, is the one that is committed, and comes out the same each time."""

import json
import re
from pathlib import Path

import matplotlib
import pytest

import refqlora as rq
from refqlora.commands import main
from refqlora.figures import canvas, picture, styled, write_figure
from refqlora.figures.gallery import GALLERY, MEASURED, measured

KEPT = Path(rq.__file__).parent.parent / "figures"


def test_one_command_draws_them_all(tmp_path, capsys):
    assert main(["figures", "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == list(GALLERY)
    names = {*GALLERY, "README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names == {path.name for path in KEPT.iterdir()}
    assert (tmp_path / "out" / "README.md").read_bytes() == (KEPT / "README.md").read_bytes()
    for name in GALLERY:
        begin = b"\x89PNG" if name.endswith(".png") else b"<?xml"
        assert (tmp_path / "out" / name).read_bytes().startswith(begin)
        assert (KEPT / name).stat().st_size < 250_000


def test_a_bad_file_of_facts_is_named(tmp_path, capsys):
    (tmp_path / "compare.json").write_text("{")
    assert main(["figures", "--out", str(tmp_path / "out"), "--measured", str(tmp_path / "compare.json")]) == 2
    assert "compare.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", GALLERY)
def test_the_same_facts_make_the_same_bytes(name):
    _, draw = GALLERY[name]
    facts = measured(MEASURED)
    kind = Path(name).suffix[1:]
    assert picture(draw(facts), kind) == picture(draw(facts), kind)


@styled
def a_line():
    figure, axes = canvas()
    axes.plot([1, 2])
    return figure


def test_the_background_is_white_and_the_reader_s_style_stays(tmp_path):
    before = dict(matplotlib.rcParams)
    write_figure(tmp_path / "a.png", a_line())
    assert dict(matplotlib.rcParams) == before
    pixels = matplotlib.image.imread(tmp_path / "a.png")
    assert (pixels[0, 0] == 1).all()


def test_what_fails_leaves_the_old_figure(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_figure(path, a_line())
    old = path.read_bytes()

    def broken(self, target, **options):
        target.write(b"half a picture")
        raise OSError("the disk is full")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", broken)
    with pytest.raises(OSError, match="full"):
        write_figure(path, a_line())
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


SPOILT = [
    (lambda facts: facts.clear(), "methods: expected what `refqlora compare` writes, got None"),
    (lambda facts: facts.update(methods=[]), "methods: expected what `refqlora compare` writes, got []"),
    (lambda facts: facts.update(merging=3), "merging: expected what `refqlora compare` writes, got 3"),
    (lambda facts: facts["methods"][1].update(new_after=None), "methods[1]: new_after: expected a number, got None"),
    (lambda facts: facts["methods"].append("full"), "trainable: expected a number, got 'full'"),
    (lambda facts: facts["methods"][1].update(rank="x"), "methods[1]: expected a method and its rank, got"),
    (lambda facts: facts["merging"].update(nf4={"loss": 1}), "merging: nf4: expected numbers by name, got"),
    (lambda facts: facts["modularity"].update(none=[1]), "modularity: none: expected numbers by name, got [1]"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILT)
def test_facts_of_another_shape_are_refused(spoil, said, tmp_path):
    facts = measured()
    spoil(facts)
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=f"compare.json: .*{re.escape(said)}"):
        measured(path)
