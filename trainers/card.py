"""The model card: what a stranger needs to know of a model folder, as Markdown with YAML front matter.

Class names and addresses are other people's text and come out as text, never as Markdown or HTML.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

import yaml

from launcher.spec import Spec

CLASSES_SHOWN = 100


def model_card(
    run_name: str, spec: Spec, classes: Sequence[str], final: dict[str, Any], versions: dict[str, str]
) -> str:
    """The card of the model that the run `run_name` left. `final` and `versions` are those of metrics.json."""
    front = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "base_model": f"timm/{spec.model.name}",
        "tags": ["image-classification", "timm", "raylaunch"],
    }
    if spec.model.pretrained == "none":
        del front["base_model"]
    shown = ", ".join(_text(label) for label in classes[:CLASSES_SHOWN])
    more = f" and {len(classes) - CLASSES_SHOWN} more" if len(classes) > CLASSES_SHOWN else ""
    scores = [(name, final.get(key)) for name, key in _SCORES]
    rows = [f"| {name} | {_score(value)} |" for name, value in scores if isinstance(value, (int, float))]
    tools = ", ".join(_text(f"{tool} {version}") for tool, version in sorted(versions.items()))
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {_text(run_name)}",
        f"{_text(spec.model.name)}, fine-tuned on {_text(spec.data.uri)} to tell {len(classes)} classes apart.",
        f"## Scores\n\nOn {final.get('count', 'the')} held-out images ({_text(final.get('split', 'val'))} split).",
        "\n".join(["| score | value |", "|---|---|", *rows]) if rows else "The model was not evaluated.",
        f"## Use\n\n    launch predict {_text(run_name)} img.jpg",
        f"## Limits\n\nIt answers with one of its classes whatever the image shows: {shown}{more}.",
        f"Made with {tools}." if tools else "",
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


_SCORES = (
    ("top-1", "top1"),
    ("top-5", "top5"),
    ("precision, mean over classes", "macro_precision"),
    ("recall, mean over classes", "macro_recall"),
    ("F1, mean over classes", "macro_f1"),
)


def _score(value: float) -> str:
    return f"{100 * value:.1f} %"


def _text(value: object) -> str:
    """One line that Markdown shows as it is; `@` and `:` would turn addresses into links."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]()#+!|~@:-])", r"\\\1", html.escape(line, quote=False))
