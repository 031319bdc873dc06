"""How this package changes SGLang: every target is checked before it is touched.

Not through SGLang's own hooks: where one of those cannot be applied, SGLang logs that and serves
without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

SUPPORTED = "0.5.19 to 0.5.23"
TESTED = "0.5.19, 0.5.23"


class UnsupportedSGLang(RuntimeError):
    """The installed SGLang does not look as a patch expects."""


def require(condition: bool, place: str, expectation: str) -> None:
    """Raises `UnsupportedSGLang` unless `condition`."""
    if not condition:
        from importlib.metadata import version

        raise UnsupportedSGLang(
            f"ep_backend cannot plug into SGLang {version('sglang')}: {place} {expectation}. "
            f"Supported: SGLang {SUPPORTED} (tested: {TESTED}). Install one of these, or keep the "
            "plugin out of this SGLang by listing the plugins you want in SGLANG_PLUGINS."
        )


def require_parameters(function: Callable[..., Any], place: str, *names: str) -> None:
    """Requires that `function` has parameters of these names."""
    parameters = inspect.signature(function).parameters
    for name in names:
        require(name in parameters, place, f"has no parameter {name!r}")


def require_global(function: Any, place: str, name: str) -> None:
    """Requires that `function` looks `name` up when it runs: only then does it see a module global
    that was replaced."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    require(code is not None and name in code.co_names, place, f"does not use the global {name!r}")
