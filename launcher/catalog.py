"""Which models timm has, known without importing timm: its list is made once per version, in a process of its own.

The list lies in the user's cache folder. Where timm is not installed there is no list, and nothing is checked here.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from contextlib import suppress
from typing import Any

from launcher.errors import UserError, nearest
from launcher.storage import cache_folder

_LIST = """
import json, timm
def facts(name):
    cfg = timm.get_pretrained_cfg(name)
    return {"size": cfg.input_size[-1], "fixed": bool(cfg.fixed_input_size), "weights": bool(cfg.has_weights)}
print(json.dumps({name: facts(name) for name in [*timm.list_models(), *timm.list_pretrained()]}))
"""


def model_facts(name: str) -> dict[str, Any]:
    """`{"size": pixels, "fixed": bool, "weights": bool}` of a timm model; empty without timm.

    Raises `UserError` with the nearest name when timm has no such model.
    """
    models = _models()
    if models and name not in models:
        close = nearest(name, models)
        raise UserError(f"timm has no model {name}" + (f"; {close}" if close else ""), where="model.name",
                        hint="python -c 'import timm; print(*timm.list_models(), sep=\"\\n\")' lists all")  # fmt: skip
    facts: dict[str, Any] = models.get(name, {})
    return facts


def _models() -> dict[str, Any]:
    try:
        version = importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError:
        return {}
    path = cache_folder() / f"models-timm-{version}.json"
    models: dict[str, Any]
    try:
        models = json.loads(path.read_text())
    except (OSError, ValueError):
        listed = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _LIST], capture_output=True, text=True, check=False
        )
        if listed.returncode:
            return {}
        models = json.loads(listed.stdout)
        with suppress(OSError):  # without a cache it is made anew the next time
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(listed.stdout)
            temporary.replace(path)
    return models
