"""Directives of the method pages. What they show comes from signatures, docstrings, overlays and results."""

from __future__ import annotations

import json
import re
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lightning_sparse.cli.methods import METHODS, arguments

__all__ = ["arguments_table", "claim", "cost", "formula", "overlays", "setup"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BY_NAME = {method.__name__: method for method in METHODS}
PLACES = {
    "resnet18, batch 128": "ResNet-18 at batch 128",
    "mlp, batch 128": "a perceptron of 2 M weights at batch 128",
    "vit, batch 32": "ViT-tiny at batch 32",
}
SUITES = ("cost-methods", "cost-finetuning")
NOT_MEASURED = "Not measured yet."


def arguments_table(method: str) -> str:
    """All arguments with default, meaning, range and choices."""
    lines = ["| argument | default | meaning |", "| --- | --- | --- |"]
    for name, default, meaning, choices in arguments(BY_NAME[method]):
        missing = [choice for choice in choices if f"`{choice}`" not in meaning]
        listed = f" Choices: {', '.join(f'`{choice}`' for choice in choices)}." if missing else ""
        text = re.sub(r"(?<!\\)\|(?![^$]*\$(?:[^$]*\$[^$]*\$)*[^$]*$)", r"\\|", meaning) + listed
        lines.append(f"| `{name}` | {default} | {text[:1].upper()}{text[1:]} |")
    return "\n".join(lines)


def formula(method: str) -> str:
    """The displayed formulas of the docstring."""
    found = re.findall(r"\$\$.+?\$\$", BY_NAME[method].__doc__ or "", flags=re.DOTALL)
    if not found:
        raise ValueError(f"the docstring of {method} has no formula in $$; write one on the page")
    return "\n\n".join(found)


def cost(method: str) -> str:
    """What the committed results say about time and memory."""
    peaks = _numbers("memory-methods")
    suites = [_numbers(suite) for suite in SUITES]
    found = [(place, times[place][method]) for times in suites for place in PLACES if method in times.get(place, {})]
    if not found:
        return NOT_MEASURED
    place, row = found[0]
    between, change = row["between"], row.get("change")
    if "inside" in between:
        share = 100 * between["inside"]
        said = [f"Inside the method: **{share:.1f}%** of a training step of {PLACES[place]}, on two CPU cores."]
    else:
        said = [f"A step of {PLACES[place]} takes {between['ratio']:.2f} times a dense one, on two CPU cores."]
    if change and "inside" in change:
        said.append(f"A step that changes masks: {100 * change['inside']:.0f}% more.")
    if (kept := row.get("bytes per weight")) is not None:
        said.append(f"Kept in memory: {kept:.0f} byte{'' if round(kept) == 1 else 's'} per weight.")
    ratios = [mine / plain for mine, plain in zip(peaks.get(place, {}).get(method, []), peaks[place]["dense"], strict=False)]
    if ratios:
        said.append(f"Peak memory: {statistics.median(ratios):.2f} times that of plain training.")
    return " ".join(said) + " ([All costs](../evidence/cost.md).)"


def claim(method: str) -> str:
    """What the evidence page says of the paper's claim, and of what was found."""
    page = (ROOT / "docs" / "evidence.md").read_text()
    section = page.partition("## What papers claim, and what was found")[2].partition("\n## ")[0]
    for name, text in re.findall(r"^### (.+)\n\n((?:[- ].*\n)+)", section, flags=re.MULTILINE):
        if f"`{method}`" in name:
            return str(text)
    return "No comparison with the paper's claims has been run yet. The tests check its formulas and its promises."


def overlays(method: str) -> str:
    """The first overlay with the method, and the names of the others."""
    alone, beside = [], []
    for file in sorted((ROOT / "configs" / "methods").glob("*.yaml"), key=lambda file: (len(file.stem), file.stem)):
        entries = yaml.safe_load(file.read_text())["trainer"]["callbacks+"]
        classes = [entry["class_path"].rpartition(".")[2] for entry in entries]
        if method in classes:
            (alone if len(classes) == 1 else beside).append(file.stem)
    first, *others = alone + beside
    text = (
        f"`--config methods/{first}` is\n\n```{{literalinclude}} ../../configs/methods/{first}.yaml\n:language: yaml\n```\n"
    )
    if others:
        text += f"\nAlso: {', '.join(f'`methods/{name}`' for name in others)}.\n"
    return text


@cache
def _numbers(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())["numbers"]
    return found


MAKERS = {"arguments": arguments_table, "formula": formula, "cost": cost, "claim": claim, "overlays": overlays}


class Card(SphinxDirective):
    """A part of a method page, made for the method that the argument names."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        method = self.arguments[0]
        if method not in BY_NAME:
            raise self.error(f"'{method}' is not a method; `lightning-sparse methods` lists them.")
        try:
            text = MAKERS[self.name](method)
        except ValueError as error:
            raise self.error(str(error)) from error
        return self.parse_text_to_nodes(text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directives."""
    for name in MAKERS:
        app.add_directive(name, Card)
    return {"parallel_read_safe": True}
