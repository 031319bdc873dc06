"""How this package changes SGLang: every target is checked before it is touched.

Not through SGLang's own hooks: where one of those cannot be applied, SGLang logs that and serves
without it.
"""

from __future__ import annotations

import inspect
from typing import Any

from ep_backend.plugins import Guard


class UnsupportedSGLang(RuntimeError):
    """The installed SGLang does not look as a patch expects."""


def _version() -> str:
    from importlib.metadata import version

    return version("sglang")


_guard = Guard(
    engine="SGLang",
    installed_version=_version,
    supported="0.5.19 to 0.5.23",
    tested="0.5.19 to 0.5.23",
    plugins_variable="SGLANG_PLUGINS",
    error=UnsupportedSGLang,
)
require = _guard.require
require_parameters = _guard.require_parameters
rebind_everywhere = _guard.rebind_everywhere


def require_global(function: Any, place: str, name: str) -> None:
    """Requires that `function` looks `name` up when it runs: only then does it see a module global
    that was replaced."""
    require(uses_global(function, name), place, f"does not use the global {name!r}")


def uses_global(function: Any, name: str) -> bool:
    """See `require_global`. Also whether it asks for an attribute of that name."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and name in code.co_names
