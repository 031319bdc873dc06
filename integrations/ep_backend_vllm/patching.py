"""How this package changes vLLM: every target is checked before it is touched.

vLLM has no registry for all-to-all backends, so a few of its functions are wrapped. A check that
fails stops the process with a text that names the place.
"""

from __future__ import annotations

import sys
from typing import Any

from ep_backend.plugins import Guard


class UnsupportedVLLM(RuntimeError):
    """The installed vLLM does not look as a patch expects."""


def _version() -> str:
    import vllm

    return vllm.__version__


_guard = Guard(
    engine="vLLM",
    installed_version=_version,
    supported="0.26 to 0.33",
    tested="0.26.0, 0.32.0",
    plugins_variable="VLLM_PLUGINS",
    error=UnsupportedVLLM,
)
require = _guard.require
require_parameters = _guard.require_parameters


def rebind_everywhere(original: Any, replacement: Any) -> None:
    """Replaces a function in its home module and wherever it was imported by name.

    Modules imported later find the replacement in the home module.
    """
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if not names or not getattr(module, "__name__", "").startswith("vllm"):
            continue
        for name, value in list(names.items()):
            if value is original:
                setattr(module, name, replacement)
