"""Whole load tests against a scripted service: what it gets, what is counted, printed and written."""

from __future__ import annotations

import io
import json
import multiprocessing
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from moe_forward.bench.crew import ClientProcessLost, Crew
from moe_forward.bench.histogram import Histogram
from moe_forward.bench.progress import Bar
from moe_forward.bench.table import table
from moe_forward.bench.tally import Progress
from moe_forward.client import RequestRefused, TransportFailed
from moe_forward.main import main


class Terminal(io.StringIO):
    """What tqdm takes for one."""

    def isatty(self) -> bool:
        return True


def schema() -> Any:
    return json.loads(resources.files("moe_forward.bench").joinpath("report.schema.json").read_text())


def test_all_answered_forwards_are_counted_and_rated(service: Any, load: Any) -> None:
    report = load(tokens=[1, 5], slo_milliseconds=1.0)
    assert (report.model, report.hidden_size, report.layers) == ("tiny", 8, (3, 4))
    assert [row.name for row in report.rows] == ["tokens=1 concurrency=3", "tokens=5 concurrency=3"]
    assert sum(row.requests for row in report.rows) == service.forwards > 0
    for row, tokens in zip(report.rows, (1, 5), strict=True):
        assert row.elapsed_seconds >= 0.15
        assert row.requests_per_second == pytest.approx(row.requests / row.elapsed_seconds)
        assert row.tokens_per_second == pytest.approx(row.requests_per_second * tokens)
        assert row.received_bytes_per_second == row.sent_bytes_per_second > 0  # the service answers with as many
        assert (row.failed, row.refused, row.late, row.unsent, row.errors, row.refusals) == (0, 0, 0, 0, {}, {})
        latency = row.latency_milliseconds
        ordered = [latency[name] for name in ("min", "p50", "p90", "p95", "p99", "p99_9", "max")]
        assert ordered == sorted(ordered)
        assert latency["min"] >= 2.0  # the service waits that long
        assert (row.objective.requests_per_second, row.objective.share) == (0.0, 0.0)
        assert Histogram.from_document(row.histogram).count == row.requests


def test_where_the_time_went_adds_up(load: Any) -> None:
    (row,) = load().rows
    assert row.queue_milliseconds["mean"] == pytest.approx(0.5)
    assert row.step_milliseconds["mean"] == pytest.approx(1.25)
    parts = (row.wait_milliseconds, row.queue_milliseconds, row.step_milliseconds, row.rest_milliseconds)
    assert sum(part["mean"] for part in parts) == pytest.approx(row.latency_milliseconds["mean"])


def test_a_service_that_does_not_tell_its_times_is_said_to(service: Any, load: Any) -> None:
    service.tell = ""
    report = load()
    assert report.rows[0].queue_milliseconds == {}
    assert "queue and step: the replies have no Server-Timing" in table(report)


def test_the_loop_is_closed_at_the_given_concurrency(service: Any, load: Any) -> None:
    service.delay_seconds = 0.01
    load(concurrency=[5])
    assert service.most_inflight == 5
    assert service.connections == 5 + 1  # and one for the placement


def test_an_open_loop_sends_at_its_rate_whatever_the_service_does(service: Any, load: Any) -> None:
    service.delay_seconds = 0.05
    (row,) = load(rate=[200.0], arrivals="constant", seconds=0.3).rows
    assert (row.loop, row.measured_from, row.rate) == ("open", "intended send", 200.0)
    assert row.requests == service.forwards == 60
    assert service.most_inflight > 5


def test_an_open_loop_that_is_capped_says_what_it_did_not_send(service: Any, load: Any) -> None:
    service.delay_seconds = 0.05
    report = load(rate=[200.0], arrivals="constant", max_inflight=1, seconds=0.3)
    (row,) = report.rows
    assert row.requests + row.unsent == 60
    assert row.unsent > 40
    assert service.most_inflight == 1
    assert re.search(rf"WARNING: {row.unsent} of 60 requests were never sent", table(report))


def test_so_many_requests_are_sent_and_no_more(service: Any, load: Any) -> None:
    (row,) = load(requests=20).rows
    assert (row.requests, service.forwards) == (20, 20)


def test_layers_and_parameters_are_sent_as_asked(service: Any, load: Any) -> None:
    assert load(layers="4", shared_experts=False, timeout_seconds=2.5, requests=8).layers == (4,)
    assert service.queries("layer") == {"4": 8}
    assert service.queries("shared_experts") == {"false": 8}
    assert service.queries("timeout_ms") == {"2500": 8}
    service.paths.clear()
    load(requests=8)
    assert service.queries("layer") == {"3": 4, "4": 4}


def test_a_mix_is_one_run_of_several_sizes(service: Any, load: Any) -> None:
    report = load(mix="1:3,6:1", requests=200)
    (row,) = report.rows
    assert row.size == "mix"
    seen = {tensors["hidden_states"].shape[0] for tensors in service.tensors()}
    assert seen == {1, 6}
    assert row.latency_milliseconds_by_tokens.keys() == {1, 6}
    large = sum(times for body, times in service.bodies.items() if len(body) == max(map(len, service.bodies)))
    assert large == pytest.approx(50, abs=20)
    assert re.search(r"^ +6 tokens: p50 ", table(report), re.MULTILINE)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)]
)
def test_hidden_states_are_random_and_fixed_by_the_seed(service: Any, load: Any, dtype: Any, expected: Any) -> None:
    load(dtype=dtype, seed=7, requests=16)
    first = set(service.bodies)
    for tensors in service.tensors():
        assert tensors.keys() == {"hidden_states"}
        assert (tensors["hidden_states"].dtype, tensors["hidden_states"].shape) == (expected, (2, 8))
    service.bodies.clear()
    load(dtype=dtype, seed=7, requests=16)
    assert set(service.bodies) == first
    assert len(first) == 4
    service.bodies.clear()
    load(dtype=dtype, seed=8, requests=16)
    assert not set(service.bodies) & first


def test_fp8_comes_with_a_scale_per_token_that_uses_the_whole_range(service: Any, load: Any) -> None:
    load(dtype="fp8", requests=8)
    for tensors in service.tensors():
        assert tensors["hidden_states"].dtype is torch.float8_e4m3fn
        assert tensors["hidden_scales"].shape == (2,)
        assert tensors["hidden_states"].float().abs().amax(dim=1).tolist() == [448.0, 448.0]


def test_routing_may_be_sent_along(service: Any, load: Any) -> None:
    load(routing="topk", requests=8)
    for tensors in service.tensors():
        assert (tensors["topk_ids"].dtype, tensors["topk_ids"].shape) == (torch.int32, (2, 2))
        assert all(len(set(row)) == 2 and max(row) < 6 for row in tensors["topk_ids"].tolist())
        assert tensors["topk_weights"].sum(dim=1).tolist() == pytest.approx([1.0, 1.0])
    service.bodies.clear()
    load(routing="logits", requests=8)
    assert [tensors["router_logits"].shape for tensors in service.tensors()] == [(2, 6)] * 4


def test_errors_are_counted_by_code_and_refusals_apart(service: Any, load: Any, refusal: Any) -> None:
    service.refusals = [
        refusal(422, "non_finite"),
        refusal(500),
        refusal(429, "queue_full", "Retry-After: 0\r\n"),
        refusal(503, "draining"),
    ]
    (row,) = load(requests=40, slo_milliseconds=1e6).rows
    assert row.errors == {"http_500": 1, "non_finite": 1}
    assert row.refusals == {"draining": 1, "queue_full": 1}
    assert (row.requests, row.failed, row.refused) == (36, 2, 2)
    assert row.objective.share == pytest.approx(0.9)


def test_a_service_that_answers_nothing_is_reported_without_latencies(service: Any, load: Any, refusal: Any) -> None:
    service.refusals, service.always = [refusal(503, "draining")], True
    report = load()
    (row,) = report.rows
    assert (row.requests, row.requests_per_second, row.latency_milliseconds) == (0, 0.0, {})
    assert row.refusals == {"draining": service.forwards}
    assert service.forwards < 30  # the callers pause after an error
    assert re.search(r"^ +2 +3 +0\.0 +0( +-){8}  draining \d+$", table(report), re.MULTILINE)


def test_the_report_is_printed_written_drawn_and_compared(
    service: Any, load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the extra `pictures` is not installed")
    old, new, picture = tmp_path / "old.json", tmp_path / "new.json", tmp_path / "load.svg"
    report = load(tokens=[2, 4], concurrency=[1, 3], json_path=old, slo_milliseconds=50.0)
    assert capsys.readouterr().out == table(report) + "\n"
    service.delay_seconds = 0.1
    load(tokens=[2], concurrency=[3, 2], json_path=new, compare_path=old, plot_path=picture, dtype="f32")
    printed = capsys.readouterr().out
    (ratios,) = re.findall(r"^tokens=2 concurrency=3 +(.*)$", printed, re.MULTILINE)
    requests_ratio, _, p50_ratio, *_ = [float(ratio.removesuffix("x")) for ratio in ratios.split()]
    assert requests_ratio < 0.7
    assert p50_ratio > 2.0
    assert re.search(r"^tokens=2 concurrency=2 +only in the new report$", printed, re.MULTILINE)
    assert printed.count("only in the old report") == 3
    assert "not the same load: dtype was bf16, is f32" in printed
    assert "tokens per second" in picture.read_text()
    for path in (old, new):
        jsonschema.validate(json.loads(path.read_text()), schema())
    document = json.loads(old.read_text())
    assert document["schema_version"] == 1
    assert document["load"]["concurrency"] == [1, 3]
    assert document["rows"][3]["requests"] == report.rows[3].requests


def test_the_schema_knows_every_field_and_no_other(load: Any) -> None:
    report = load(rate=[100.0], self_check=True, seconds=0.1)
    (row,) = report.rows
    assert row.generator.ceiling_share == pytest.approx(
        row.requests_per_second / row.generator.ceiling_requests_per_second
    )
    document = json.loads(report.to_json())
    jsonschema.validate(document, schema())
    for part in (document, document["load"], document["rows"][0], document["rows"][0]["generator"]):
        part["surprise"] = 1
        with pytest.raises(jsonschema.ValidationError, match="surprise"):
            jsonschema.validate(document, schema())
        del part["surprise"]


def test_two_processes_share_the_load_and_their_counts_are_one(service: Any, load: Any) -> None:
    (row,) = load(processes=2, concurrency=[3], requests=31, warmup_seconds=0.1).rows
    assert row.requests == 31
    assert row.generator.processes == 2
    assert service.most_inflight == 3
    assert len(service.bodies) == 4  # both have the same inputs


def test_a_client_process_that_is_gone_ends_the_test() -> None:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    theirs.close()
    with pytest.raises(ClientProcessLost, match="a client process ended before its run did"):
        Crew([ours]).run([None], lambda progress: None)  # type: ignore[list-item]
    ours.close()


def test_rate_median_and_failures_are_shown_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    bar = Bar(2.0)
    bar.run("tokens=1 rate=5")
    for latency_ns, failed in ((2_000_000, 0), (4_000_000, 3), (8_000_000, 0)):
        now[0] += 0.3
        progress = Progress(failed=failed)
        progress.latency.add(latency_ns)
        bar.tell(progress)
    bar.close()
    assert "tokens=1 rate=5: 3 req/s, p50 2.00 ms, 3 failed" in terminal.getvalue()
    assert " 30%|" in terminal.getvalue()


@pytest.mark.parametrize("placement", [{}, {"model": "tiny", "hidden_size": 8, "layers": None}])
def test_a_placement_without_the_sizes_is_refused(service: Any, load: Any, placement: Any) -> None:
    service.placement = placement
    with pytest.raises(TransportFailed, match="the placement needs model, hidden_size, num_experts, top_k and layers"):
        load()


def test_an_empty_placement_has_nothing_to_load(service: Any, load: Any) -> None:
    service.placement = service.placement | {"layers": []}
    with pytest.raises(TransportFailed, match="has no layers"):
        load()


def test_wrong_arguments_are_refused_before_anything_is_sent(service: Any, load: Any, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"schema_version": 0}')
    for options, message in (
        ({"layers": "9"}, r"layers must be some that tiny serves, \[3, 4\], got 9"),
        ({"plot_path": tmp_path / "load.pdf"}, r"plot must be a file named \*.svg or \*.png"),
        ({"compare_path": tmp_path / "old.json"}, "must be a report of schema_version 1, got 0"),
        ({"compare_path": tmp_path / "none.json"}, "cannot read the report"),
    ):
        with pytest.raises(ValueError, match=message):
            load(**options)
    assert service.forwards == 0


def test_a_picture_without_matplotlib_names_the_extra(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'moe-forward\[pictures\]'"):
        load(plot_path=tmp_path / "load.svg")


def test_the_first_key_of_the_file_is_sent(service: Any, load: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# mine\nalice:k-0123456789abcdef\n")
    load(api_key_file=tmp_path / "keys", requests=3)
    assert all("\r\nAuthorization: Bearer k-0123456789abcdef\r\n" in head for head in service.heads)
    service.placement_status = 401
    with pytest.raises(RequestRefused):
        load()


def test_the_command_line_says_everything(service: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--mix 1:3,2:1 --layers 3 --layer-order random --rate 100 --arrivals constant --max-inflight 8"
    flags += " --requests 5 --warmup-seconds 0 --dtype f16 --routing logits --no-shared-experts --slo-ms 100"
    flags += " --no-self-check --timeout-seconds 5 --seed 3 --processes 1"
    assert main(["bench", service.url, *flags.split()]) == 0
    assert "within 100 ms" in capsys.readouterr().out
    assert service.forwards == 5
    assert service.queries("shared_experts") == {"false": 5}
    for tensors in service.tensors():
        assert tensors["router_logits"].shape[1] == 6


def test_files_that_cannot_be_used_are_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("")
    empty = str(tmp_path / "empty")
    for flag, message in (("--api-key-file", "has no API key"), ("--ca-file", "has no PEM certificates")):
        assert main(["bench", "https://127.0.0.1:1", flag, empty]) == 1
        assert message in capsys.readouterr().err
