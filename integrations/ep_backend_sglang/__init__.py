"""ep_backend in SGLang: `--moe-a2a-backend ep_backend --deepep-mode auto`.

SGLang loads `register` as a general plugin in every process: before the command line is parsed, in
schedulers, in the detokenizer. To SGLang our backend is its own `deepep`, in every model, overlap
and graph, with another `Buffer` behind its dispatcher. With another backend chosen, nothing behaves
differently, unless a benchmark on a CPU asks for that (`cpu_default`).
"""

from __future__ import annotations

import traceback

_is_registered = False


def register() -> None:
    """Makes the backend known to SGLang. Idempotent.

    Raises:
        SystemExit: this SGLang does not look as the patches expect; the text says where, and which
            versions are supported. Not an `Exception`: SGLang logs those of plugins and goes on.
    """
    global _is_registered
    if _is_registered:
        return
    try:
        # Imported here: the package must be importable where SGLang is not installed.
        from ep_backend_sglang import arguments, choice, cpu_default

        arguments.check()
        arguments.install()
        if choice.is_ours():  # a child of the process that was told so
            choice.install()
        elif cpu_default.is_wanted():
            cpu_default.check()
            cpu_default.install()
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(f"ep_backend's plugin stops this process: {error}") from error
    _is_registered = True
