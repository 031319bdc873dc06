"""The commit of a result."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from ep_backend.bench import provenance


def git(directory: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(directory), *identity, *arguments], check=True)


def test_a_checkout_has_a_commit_and_changes_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = tmp_path / "ep_backend" / "bench"
    bench.mkdir(parents=True)
    source = bench / "provenance.py"
    source.write_text("1")
    monkeypatch.setattr(provenance, "__file__", str(source))
    assert provenance.commit() is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    clean = provenance.commit()
    assert clean is not None
    assert re.fullmatch(r"[0-9a-f]{10}", clean)
    source.write_text("2")
    assert provenance.commit() == clean + "+"


def test_an_installed_package_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / ".venv" / "ep_backend" / "bench"
    site.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(site / "provenance.py"))
    git(tmp_path, "init", "-q")
    assert provenance.commit() is None
