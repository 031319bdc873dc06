"""How this package changes vLLM: every target is checked before it is touched.

vLLM has no registry for all-to-all backends, so a few of its functions are wrapped. A check that
fails stops the process with a text that names the place.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

SUPPORTED = "0.26 to 0.33"
TESTED = "0.32.0"


class UnsupportedVLLM(RuntimeError):
    """The installed vLLM does not look as a patch expects."""


def require(condition: bool, place: str, expectation: str) -> None:
    """Raises `UnsupportedVLLM` unless `condition`."""
    if not condition:
        import vllm

        raise UnsupportedVLLM(
            f"ep_backend cannot plug into vLLM {vllm.__version__}: {place} {expectation}. "
            f"Supported: vLLM {SUPPORTED} (tested: {TESTED}). Install one of these, or keep the "
            "plugin out of this vLLM by listing the plugins you want in VLLM_PLUGINS."
        )


def require_parameters(function: Callable[..., Any], place: str, *names: str) -> None:
    """Requires that `function` has parameters of these names."""
    parameters = inspect.signature(function).parameters
    for name in names:
        require(name in parameters, place, f"has no parameter {name!r}")


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
