"""The tuning table as a file: what is read, what is refused, and how it is written."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ep_backend.tuning import Entry, Shape, Site, Table, TableUnreadable, merge_into, table_path

SHAPE = Shape(
    kernels="low_latency",
    num_ranks=8,
    hidden=7168,
    num_experts=256,
    top_k=8,
    dtype="bfloat16",
    dispatch_dtype="float8_e4m3fn",
    combine_dtype="bfloat16",
    output_layout="expert_major",
    reduction="rank",
    has_workspaces=False,
)
SITE = Site("NVIDIA H100", "nvlink-18", 7)
ENTRY = Entry(
    SHAPE, SITE, {"num_sms": 24, "transfer": "push", "num_max_tagged_tokens": 16}, {"gain": 1.1}
)


def document_with(**changes: Any) -> dict[str, Any]:
    return {"schema": 1, "entries": [asdict(ENTRY) | changes]}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tuning.json"
    assert Table.read(path) == Table()
    assert merge_into(path, [ENTRY]) is None
    assert Table.read(path) == Table((ENTRY,))


def test_entries_of_other_shapes_and_sites_stay(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    others = [
        replace(ENTRY, shape=replace(SHAPE, hidden=4096)),
        replace(ENTRY, site=replace(SITE, device="NVIDIA H200")),
        replace(ENTRY, site=replace(SITE, protocol=8)),
    ]
    merge_into(path, [ENTRY, *others])
    again = replace(ENTRY, settings={"num_sms": 8})
    merge_into(path, [again])
    assert Table.read(path) == Table((again, *others))
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["tuning.json"]


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    entries = [replace(ENTRY, shape=replace(SHAPE, hidden=128 * n)) for n in range(1, 25)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda entry: merge_into(path, [entry]), entries))
    assert set(e.shape.hidden for e in Table.read(path).entries) == {128 * n for n in range(1, 25)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "its schema is None, this version reads 1"),
        (json.dumps({"schema": 2, "entries": []}), "its schema is 2, this version reads 1"),
        (json.dumps({"schema": 1}), "an entry is malformed .*'entries'"),
        (json.dumps(document_with(settings={"num_sm": 3})), "setting 'num_sm', expected some of"),
        (json.dumps(document_with(settings={"num_sms": 0})), "num_sms is 0"),
        (json.dumps(document_with(settings={"num_sms": 2.5})), "num_sms is 2.5"),
        (json.dumps(document_with(settings={"num_sms": True})), "num_sms is True"),
        (json.dumps(document_with(settings={"transfer": "shove"})), "transfer is 'shove'"),
        (json.dumps(document_with(settings={"num_bytes": 1 << 20})), "setting 'num_bytes'"),
        (json.dumps(document_with(site={"device": "x", "link": "shm"})), "'protocol'"),
    ],
)
def test_a_file_that_is_no_table_is_refused_and_kept(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(text)
    with pytest.raises(TableUnreadable, match=message):
        Table.read(path)
    moved = merge_into(path, [ENTRY])
    assert moved == tmp_path / "tuning.json.old"
    assert moved.read_text() == text
    assert Table.read(path) == Table((ENTRY,))


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"HOME": "/home/u"}, "/home/u/.cache/ep_backend/tuning.json"),
        ({"HOME": "/home/u", "XDG_CACHE_HOME": "/c"}, "/c/ep_backend/tuning.json"),
        ({"XDG_CACHE_HOME": "/c", "EP_BACKEND_TUNING": "/t.json"}, "/t.json"),
    ],
)
def test_where_the_table_is(environ: dict[str, str], path: str) -> None:
    assert table_path(environ) == Path(path)


def test_the_table_can_be_switched_off() -> None:
    assert table_path({"EP_BACKEND_TUNING": "off", "XDG_CACHE_HOME": "/c"}) is None


def test_a_user_without_a_home_has_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number: buffers are made there, too."""

    def unknown(_uid: int) -> None:
        raise KeyError("no such user")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)
    assert table_path({}) is None
    assert table_path({"EP_BACKEND_TUNING": "/t.json"}) == Path("/t.json")


def test_which_settings_a_shape_has() -> None:
    rank_major = replace(SHAPE, output_layout="rank_major", has_workspaces=True)
    assert SHAPE.settings_of("cuda") == ("num_sms", "transfer", "num_max_tagged_tokens")
    assert rank_major.settings_of("cuda") == ("num_sms", "num_max_tagged_tokens")
    assert replace(rank_major, num_ranks=1).settings_of("cuda") == ("num_sms",)
    assert SHAPE.settings_of("cpu") == ("spin_us",)
    assert replace(SHAPE, kernels="normal").settings_of("cuda") == ("num_bytes", "num_sms")


def test_a_site_tells_what_another_has_otherwise() -> None:
    assert SITE.differences(SITE) == ""
    other = Site("NVIDIA H200", "nvlink-18", 6)
    assert SITE.differences(other) == "device 'NVIDIA H200', not 'NVIDIA H100', protocol 6, not 7"
