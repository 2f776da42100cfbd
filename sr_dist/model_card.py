"""The model card of an exported generator: a README.md as Hugging Face shows it.

It says what is known of a model and calls unknown what is not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

UNKNOWN = "unknown"
# Where pictures come from and what is written when is no part of how a model was trained.
_LEFT_OUT = ("tracking", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Source:
    """A trained model that the exported one was made of."""

    name: str
    recipe: Mapping[str, Any] | None = None  # the run's config.yaml
    meta: Mapping[str, Any] | None = None  # the checkpoint's meta.json
    card: str | None = None  # the README.md of an exported model


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a model beside its weights; None is unknown."""

    title: str
    sources: Sequence[Source]
    alpha: float | None = None  # of an interpolation: the second source's weight
    license: str | None = None  # as Hugging Face names it, for example cc-by-4.0
    data: str | None = None  # what it was trained on, in words
    metrics: Mapping[str, Any] | None = None  # the metrics.json of launch/evaluate.py


def write(description: Mapping[str, Any], parameters: int, facts: Facts) -> str:
    """The card's text.

    `description`: the arguments of `models.build_generator`, as it was trained; what is exported
    has no BatchNorm.
    """
    scale, channels = description["scale"], description["channels"]
    # What a source's licence means for what was made of it is for people to decide.
    cards = all(source.card is not None for source in facts.sources)
    unsaid = "see the cards under Training" if cards else UNKNOWN
    header = {
        "license": facts.license or UNKNOWN,
        "library_name": "sr_dist",
        "pipeline_tag": "image-to-image",
        "tags": ["super-resolution", description["name"], "sr_dist"],
    }
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {_plain(facts.title)}",
        "",
        f"Enlarges {'colour' if channels == 3 else 'gray'} pictures {scale} times. "
        f"{description['name']} with {parameters:,} parameters.",
        "",
        "```python",
        "import sr_dist",
        "",
        f"model = sr_dist.load({json.dumps(facts.title)})  # this folder, or owner/name",
        f"sr = model(lr).clamp(0, 1)  # (N, {channels}, H, W) float32 in [0, 1] to (N, {channels}, "
        f"{scale}H, {scale}W)",
        "```",
        "",
        *_architecture(description),
        *("## Data", "", _plain(facts.data or f"What it was trained on: {unsaid}."), ""),
        *_numbers(facts.metrics),
        *_training(facts),
        *("## Licence", "", f"Of the weights: {_plain(facts.license or unsaid)}.", ""),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _architecture(description: Mapping[str, Any]) -> list[str]:
    folded = {"norm": "batch, folded into the convolutions"}
    shown = {**description, **(folded if description["norm"] == "batch" else {})}
    return ["## Architecture", "", *(f"- {key}: {value}" for key, value in shown.items()), ""]


def _numbers(metrics: Mapping[str, Any] | None) -> list[str]:
    lines = ["## Numbers", ""]
    if metrics is None:
        return [*lines, f"How well it does is {UNKNOWN}: no measurement was given.", ""]
    rows = metrics["results"]
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "name"))
    protocol = ", ".join(f"{key} {value}" for key, value in metrics["protocol"].items())
    return [
        *lines,
        f"Means over {metrics['images']} pictures, measured by `launch/evaluate.py`; each row is a "
        f"model or method by the name it was given there. Protocol: {_plain(protocol)}.",
        "",
        f"| | {' | '.join(_cell(column) for column in columns)} |",
        "|---" * (1 + len(columns)) + "|",
        *(
            f"| {' | '.join(_cell(row.get(key, UNKNOWN)) for key in ('name', *columns))} |"
            for row in rows
        ),
        "",
    ]


def _training(facts: Facts) -> list[str]:
    lines = ["## Training", ""]
    if facts.alpha is not None:
        one, other = (_plain(source.name) for source in facts.sources)
        lines += [
            f"Interpolated: {1 - facts.alpha:g} of the weights of {one} and {facts.alpha:g} of "
            f"those of {other}.",
            "",
        ]
    for source in facts.sources:
        if source.card is not None:
            lines += [f"The card of {_plain(source.name)} says:", "", *_quoted(source.card), ""]
            continue
        meta = source.meta or {}
        versions = meta.get("versions") or {}
        lines += [
            f"{_plain(source.name)}:",
            "",
            f"- steps: {meta.get('step', UNKNOWN)}",
            f"- crops seen: {meta.get('images_seen', UNKNOWN)}",
            f"- processes: {meta.get('world_size', UNKNOWN)}",
            f"- sr_dist: {versions.get('sr_dist', UNKNOWN)}",
            f"- torch: {versions.get('torch', UNKNOWN)}",
            f"- commit: {versions.get('commit', UNKNOWN)}",
            *([f"- recipe: {UNKNOWN}"] if source.recipe is None else []),
            "",
        ]
        if source.recipe is not None:
            kept = {key: value for key, value in source.recipe.items() if key not in _LEFT_OUT}
            recipe = yaml.safe_dump(_without_folders(kept), sort_keys=False, allow_unicode=True)
            lines += ["```yaml", recipe.rstrip(), "```", ""]
    return lines


def _quoted(card: str) -> list[str]:
    """What `write` says after the architecture; of another's card, all after its header."""
    text = card.split("\n---\n", 1)[-1] if card.startswith("---\n") else card
    text = text[max(text.find("\n## Data\n"), 0) :]
    return [f"> {line}".rstrip() for line in text.strip().splitlines()]


def _without_folders(value: Any) -> Any:
    """Paths cut to their last part: where somebody keeps files is not for publication."""
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return PurePath(value).name if isinstance(value, str) else value


def _plain(text: str) -> str:
    """On one line, as a line of Markdown can hold it."""
    return " ".join(text.split())


def _cell(value: object) -> str:
    return _plain(str(value)).replace("|", "\\|")
