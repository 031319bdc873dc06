"""What is said of served models is what the benchmarks have written."""

from __future__ import annotations

import math

import pytest

from tests.readme.pages import FLOWING, PAGES, README, in_words, median, medians, results, runs_of


def test_served_numbers_are_those_of_the_results() -> None:
    def tpot(run: dict) -> str:
        ms = run["tpot_mean_ms"]
        return f"{ms['median']:.2f} ({ms['min']:.2f}-{ms['max']:.2f})"

    for num_gpus in (2, 4):
        measured = results(f"serve-vllm-{num_gpus}-h200.json")
        assert measured["settings"]["backends"] == ["default", "ep_backend_low_latency"]
        assert len(runs_of(measured)) == 5
        for concurrency, (theirs, ours) in runs_of(measured).items():
            ratios = [
                median(ours, metric) / median(theirs, metric)
                for metric in ("tpot_mean_ms", "output_tokens_per_sec")
            ]
            rates = [median(run, "output_tokens_per_sec") for run in (theirs, ours)]
            assert (
                f"| {concurrency} | {tpot(theirs)} | {tpot(ours)} | {ratios[0]:.2f} "
                f"| {rates[0]:.0f} | {rates[1]:.0f} | {ratios[1]:.2f} |"
            ) in README
        assert all(gate["good"] for gate in measured["gates"])
    of_two = results("serve-vllm-2-h200.json")["gates"]
    assert [gate["max"] for gate in of_two if "max" in gate] == [0.0]
    assert [gate["good"] for gate in results("serve-vllm-2-h200-fault.json")["gates"]] == [
        True,
        False,
    ]


def test_what_is_said_of_servers_on_four_gpus_is_as_measured() -> None:
    measured = results("serve-vllm-4-h200.json")
    runs = runs_of(measured)
    theirs, ours = runs[128]
    rates = theirs["output_tokens_per_sec"]
    assert 0.6 < rates["min"] / rates["max"] < 0.7  # "a third fewer"
    tpot = ours["tpot_mean_ms"]["max"] / theirs["tpot_mean_ms"]["min"]
    rate = ours["output_tokens_per_sec"]["min"] / rates["max"]
    itl = [median(run, "itl_p99_ms") for run in (ours, theirs)]
    told = f"{tpot:.2f} in TPOT and {rate:.2f} in tokens/s, and the 99th percentile of the time "
    assert told + "between two tokens was {:.0f} ms, vLLM's {:.0f}.".format(*itl) in FLOWING
    for metric, are_longer in (("ttft_p50_ms", [True] * 3), ("ttft_p99_ms", [False, True, False])):
        ttft = [[median(run, metric) for run in runs[c]] for c in (8, 32, 64)]
        assert [of_vllm < of_us for of_vllm, of_us in ttft] == are_longer
        of_vllm, of_us = zip(*ttft, strict=True)
        assert f"({in_words(of_us, 0)} ms, vLLM's {in_words(of_vllm, 0)})" in FLOWING
    own, gates = measured["gates"][0], measured["gates"][1::2]
    assert {gate["backend"] for gate in gates} == {"ep_backend_low_latency"}
    mean, most = (max(gate[name] for gate in gates) for name in ("mean", "max"))
    assert f"by {mean:.3f} in the mean and {most:.3f} at most" in FLOWING
    again = own["again"]
    assert f"differs from itself by {again['mean']:.3f} and {again['max']:.3f}." in FLOWING
    ranks_without = math.comb(96, 8) / math.comb(128, 8)
    assert f"{4 * (1 - ranks_without):.1f} of them if experts are as likely" in FLOWING


@pytest.mark.parametrize(
    ("name", "backends"),
    [
        ("h200-dbo", ["ep_backend_low_latency", "ep_backend_low_latency_dbo"]),
        ("h200-ht", ["default", "ep_backend_high_throughput"]),
    ],
)
def test_numbers_of_few_runs_are_those_of_the_results(name: str, backends: list[str]) -> None:
    measured = results(f"serve-vllm-2-{name}.json")
    assert measured["settings"]["backends"] == backends
    assert all(gate["good"] for gate in measured["gates"])
    ratios = []
    for concurrency, pair in runs_of(measured).items():
        tpot = [median(run, "tpot_mean_ms") for run in pair]
        is_single = all(run["tpot_mean_ms"]["min"] == run["tpot_mean_ms"]["max"] for run in pair)
        assert is_single == (name == "h200-dbo")
        ratios.append(tpot[1] / tpot[0])
        cells = [f"{ms:.1f}" for ms in tpot] + [f"{ratios[-1]:.1f}"]
        for metric in ("ttft_p50_ms", "output_tokens_per_sec"):
            cells += [f"{median(run, metric):.0f}" for run in pair]
        assert f"| {concurrency} | {' | '.join(cells)} |" in PAGES
    own, other = (gate["again"] for gate in measured["gates"][:2])
    versus = measured["gates"][1]
    told = f"by {versus['mean']:.3f} in the mean and {versus['max']:.3f} at most"
    assert told in FLOWING
    if name == "h200-dbo":
        assert own["max"] == 0.0
        assert f"differs from itself by {other['mean']:.3f} and {other['max']:.3f}," in FLOWING
        assert f"{max(ratios):.1f} times as slow there as without" in README
    else:
        theirs, ours = (
            max(gate["again"]["max"] for gate in measured["gates"][first::2]) for first in (0, 1)
        )
        told = f"asked twice, vLLM's differs from itself by up to {theirs:.3f}, ours by {ours:.3f}"
        assert told in FLOWING


def test_numbers_of_small_steps_are_those_of_the_results() -> None:
    measured = results("multi-gpu-2-h200-small.json")
    pairs = {
        case["num_tokens"]: case["pair"]["median_us"]
        for case in measured["cases"]
        if case["num_max_tagged_tokens"] != 0
    }
    told = "whose pair takes {:.1f} us for one token a rank, {:.1f} for 128 and {:.1f} for 512"
    assert told.format(pairs[1], pairs[128], pairs[512]) in FLOWING
    normal = {case["num_tokens"]: case for case in measured["normal"]["cases"]}
    times = [
        normal[num_tokens][what]["median_us"]
        for num_tokens in (1, 128, 512)
        for what in ("dispatch", "combine")
    ]
    told = (
        "normal kernels take {:.1f} and {:.1f} for the dispatch and the combine of one, "
        "{:.1f} and {:.1f} of 128, {:.1f} and {:.1f} of 512"
    )
    assert told.format(*times) in FLOWING


def test_profiled_numbers_are_those_of_the_results() -> None:
    names = ("serve-vllm-2-h100.json", "serve-vllm-2-h100-ours.json")
    profiles = [profile for name in names for profile in results(name)["profiles"]]
    assert len(profiles) == 4
    for profile in profiles:
        for rank, row in enumerate(profile["ranks"]):
            percent = {kind: 100 * share for kind, share in row["shares"].items()}
            assert (
                f"| {profile['concurrency']} "
                f"| {'vLLM' if profile['backend'] == 'default' else 'ours'} | {rank} "
                f"| {row['dispatch_shortest_us']:.1f} | {row['combine_shortest_us']:.1f} "
                f"| {row['dispatch_us']:.1f} | {row['combine_us']:.1f} "
                f"| {percent['dispatch'] + percent['combine']:.1f} | {percent['experts']:.1f} "
                f"| {percent['attention']:.1f} | {percent['other']:.1f} | {percent['idle']:.1f} |"
            ) in PAGES


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_numbers_served_on_a_cpu_are_those_of_the_results(engine: str) -> None:
    measured = results(f"serve-{engine}-cpu-2-ranks.json")
    assert measured["settings"]["engine"] == engine
    runs = {(run["concurrency"], run["backend"]): run for run in measured["summary"]}
    for concurrency in (1, 4):
        pair = [runs[concurrency, b] for b in measured["settings"]["backends"]]
        tpot = [run["tpot_mean_ms"] for run in pair]
        times = [f"{ms['median']:.2f} ({ms['min']:.2f}-{ms['max']:.2f})" for ms in tpot]
        shares = [f"{run['exchange_share_of_forward']['median']:.0%}" for run in pair]
        assert (
            f"| {concurrency} | {times[0]} | {times[1]} "
            f"| {tpot[1]['median'] / tpot[0]['median']:.2f} | {shares[0]} | {shares[1]} |"
        ) in PAGES
    assert f"load {measured['load_average_before']:.0f} at the start" in PAGES
    assert [gate["good"] for gate in measured["gates"]] == [True] * 4


def test_numbers_of_vllm_with_eplb_are_those_of_the_results() -> None:
    measured = results("serve-vllm-2-h200-eplb.json")
    assert measured["settings"]["backends"] == ["default", "ep_backend_low_latency", "eplb"]
    assert all(gate["good"] for gate in measured["gates"])
    assert len(runs_of(measured)) == 3
    for concurrency, runs in runs_of(measured).items():
        tpot, first = medians(runs, "tpot_mean_ms", "ttft_p50_ms")
        row = [f"{ms:.2f}" for ms in (*tpot, tpot[1] / tpot[0], tpot[2] / tpot[0])]
        row += [f"{ms:.0f}" for ms in first]
        assert f"| {concurrency} | {' | '.join(row)} |" in PAGES
    _, ours, eplb = measured["gates"]
    assert (ours["max"], ours["again"]["max"]) == (0.0, 0.0)
    again = eplb["again"]
    told = (
        f"they differ by {eplb['mean']:.3f} in the mean and {eplb['max']:.3f} at most, and when "
        f"asked twice by {again['mean']:.3f} and {again['max']:.3f}:"
    )
    assert told in FLOWING


def test_numbers_of_sglang_on_two_gpus_are_those_of_the_results() -> None:
    ratios, told = [], []
    for card, small in (
        ("h100", "at most 2048 tokens a rank on the H100s"),
        ("h200", "of 512 on the H200s"),
    ):
        measured = results(f"serve-sglang-2-{card}.json")
        assert {card.upper() in gpu for gpu in measured["machine"]["gpus"]} == {True}
        assert measured["settings"]["backends"] == ["default", "ep_backend"]
        assert all(gate["good"] for gate in measured["gates"])
        differences = [gate["max"] for gate in measured["gates"] if "max" in gate]
        differences += [gate["again"]["max"] for gate in measured["gates"]]
        assert set(differences) == {0.0}, "as told: bit by bit, and the same when asked twice"
        assert len(runs_of(measured)) == 5
        later = []
        for concurrency, (theirs, ours) in runs_of(measured).items():
            assert (theirs["num_runs"], ours["num_runs"]) == (2, 2)
            times = [
                f"{ms['median']:.2f} ({ms['min']:.2f}-{ms['max']:.2f})"
                for ms in (theirs["tpot_mean_ms"], ours["tpot_mean_ms"])
            ]
            tpot, first, rate = medians(
                (theirs, ours), "tpot_mean_ms", "ttft_p50_ms", "output_tokens_per_sec"
            )
            later.append(first[1] / first[0])
            ratios.append(tpot[1] / tpot[0])
            assert (
                f"| 2 {card.upper()} | {concurrency} | {times[0]} | {times[1]} "
                f"| {tpot[1] / tpot[0]:.2f} | {first[0]:.0f} | {first[1]:.0f} "
                f"| {rate[0]:.0f} | {rate[1]:.0f} |"
            ) in PAGES
        told.append(f"{min(later):.1f} to {max(later):.1f}")
        if card == "h100":
            a_token = (
                f"{min(ratios):.2f} to {max(ratios):.2f} times as long as with its own exchange"
            )
            a_first = f"at 1 to 128 in flight, a first token {told[0]} times"
            assert f"a token takes {a_token} {a_first}" in FLOWING
        assert small in FLOWING
    first_tokens = "First tokens take {} times as long where 2048 tokens are few, {} where 512 are"
    assert first_tokens.format(*told) in FLOWING
    a_token = f"a token takes {min(ratios):.2f} to {max(ratios):.2f} times as long as with its own"
    assert a_token in FLOWING


def test_numbers_of_sglangs_overlap_and_eplb_are_those_of_the_results() -> None:
    measured = results("serve-sglang-2-h200-tbo-eplb.json")
    assert measured["settings"]["backends"] == ["plain", "tbo", "eplb"]
    assert all(gate["good"] for gate in measured["gates"])
    assert len(runs_of(measured)) == 3
    slower = []
    for concurrency, runs in runs_of(measured).items():
        tpot, first = medians(runs, "tpot_mean_ms", "ttft_p50_ms")
        slower.append(tpot[1] / tpot[0])
        row = [f"{ms:.2f}" for ms in tpot] + [f"{ms:.0f}" for ms in first]
        assert f"| {concurrency} | {' | '.join(row)} |" in PAGES
    assert f"{min(slower):.1f} to {max(slower):.1f} times as slow there as without" in README
    plain, tbo, eplb = measured["gates"]
    told = (
        f"by {tbo['mean']:.4f} and {eplb['mean']:.4f} (its own, asked twice, by "
        f"{plain['again']['mean']:.4f}), by {tbo['max']:.3f} and {eplb['max']:.3f} at most"
    )
    assert told in FLOWING


def test_profiled_numbers_of_sglang_are_those_of_the_results() -> None:
    shortest = {
        (profile["backend"], profile["concurrency"]): [
            min(row[f"{what}_shortest_us"] for row in profile["ranks"])
            for what in ("dispatch", "combine")
        ]
        for profile in results("serve-sglang-2-h100.json")["profiles"]
    }
    told = (
        "a dispatch and a combine take {:.1f} and {:.1f} us at least with one request in flight, "
        "{:.1f} and {:.1f} with 32; what SGLang has in their place, a gather and a reduction, "
        "{:.1f} and {:.1f}, and {:.1f} and {:.1f},"
    )
    times = [
        us for backend in ("ep_backend", "default") for c in (1, 32) for us in shortest[backend, c]
    ]
    assert told.format(*times) in FLOWING
