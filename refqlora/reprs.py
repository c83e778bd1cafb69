"""How the engine's objects show themselves in a notebook: a table of facts."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any


def facts_html(title: str, facts: Mapping[str, Any]) -> str:
    """An HTML table with a row for each fact: whole numbers with thousands separated, others to six digits."""
    rows = ""
    for name, value in facts.items():
        text = f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
        rows += f"<tr><th style='text-align: left'>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
    return f"<table><caption>{html.escape(title)}</caption>{rows}</table>"
