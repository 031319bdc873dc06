"""Whether SGLang was told to use our backend, in this process or in the one that started it."""

from __future__ import annotations

import os

NAME = "ep_backend"
"""What users pass to `--moe-a2a-backend`."""
BUILT_IN = "deepep"
"""What SGLang is made to read in its place."""

# Schedulers get the resolved arguments, where our name stands no more; environments are inherited.
VARIABLE = "EP_BACKEND_SGLANG_CHOSEN"
_is_installed = False


def is_ours() -> bool:
    return os.environ.get(VARIABLE) == "1"


def make_ours() -> None:
    """From here on `deepep` means our backend, in this process and in those that it starts.

    Raises:
        UnsupportedSGLang: what has to be replaced does not look as expected.
    """
    install()
    os.environ[VARIABLE] = "1"


def install() -> None:
    """Puts our buffer behind SGLang's dispatcher. Idempotent."""
    global _is_installed
    if _is_installed:
        return
    from ep_backend_sglang import cpu_only, dispatcher, idle_ranks, small_prefill, standard, tracing

    parts = (dispatcher, small_prefill, idle_ranks, cpu_only, standard, tracing)
    for part in parts:  # all first: a half-applied plugin would be worse than none
        part.check()
    for part in parts:
        part.install()
    _is_installed = True
