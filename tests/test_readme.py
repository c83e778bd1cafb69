"""The README: its Python runs as pasted, its reading path is the engine's, and the files that it names exist."""

import json
import re
from pathlib import Path

import refqlora

PACKAGE = Path(refqlora.__file__).parent
README = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_runs_as_pasted(tmp_path, monkeypatch, capsys):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "8,654,848 bytes, 4.127 bits a parameter" in out
    answer = program.split("'")[1].replace("\\n", "")
    assert out.count(answer) == 1  # after the training, not before
    assert (tmp_path / "area-adapter" / "adapter_model.safetensors").is_file()


def test_the_reading_path_is_the_engine_s():
    """Every file in the order of the package's docstring, with its lines, to the ten."""
    groups = re.findall(r"^    (\w+(?:, \w+)*)  ", refqlora.__doc__, re.M)
    order = ["minimal", *(name for group in groups for name in group.split(", "))]
    rows = re.findall(r"^\| \[(\w+)\.py\]\(refqlora/\1\.py\) \| (\d+) \|", README, re.M)
    assert [name for name, _ in rows] == order
    for name, lines in rows:
        assert abs(int(lines) - (PACKAGE / f"{name}.py").read_text(encoding="utf-8").count("\n")) <= 10, name


def test_what_it_links_to_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 20
    assert [link for link in links if not (PACKAGE.parent / link).exists()] == []


def test_the_comparison_s_table_is_the_one_that_was_measured():
    measured = json.loads((PACKAGE / "assets" / "compare.json").read_text(encoding="utf-8"))
    rows = [re.sub(r"[| ]+", " ", line).split() for line in re.findall(r"^\| (?:full|Q?LoRA) \|.*", README, re.M)]
    for row, cells in zip(measured["methods"], rows, strict=True):
        new, old = (row[f"{task}_after"] - row[f"{task}_before"] for task in ("new", "old"))
        assert cells == [
            row["method"],
            *([] if row["rank"] is None else [str(row["rank"])]),
            f"{row['trainable']:,}",
            f"{row['bytes']:,}",
            f"{row['seconds_per_step']:.3f}",
            f"{row['new_after']:.4f}",
            f"{new:+.4f}",
            f"{row['old_after']:.4f}",
            f"{old:+.4f}",
        ]
    assert measured["machine"]["processor"].split("-")[0].strip() in README
