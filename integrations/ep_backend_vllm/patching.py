"""How this package changes vLLM: every target is checked before it is touched.

vLLM has no registry for all-to-all backends, so a few of its functions are wrapped. A check that
fails stops the process with a text that names the place.
"""

from __future__ import annotations

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
    tested="0.26.0, 0.30.0, 0.31.0, 0.32.0",
    plugins_variable="VLLM_PLUGINS",
    error=UnsupportedVLLM,
)
require = _guard.require
require_parameters = _guard.require_parameters
rebind_everywhere = _guard.rebind_everywhere
