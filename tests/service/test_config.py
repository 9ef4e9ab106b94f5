"""The configuration: defaults, overrides, and errors that name the key, what was expected and what came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moe_forward.config import Config, load_config, parse_layers
from moe_forward.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def test_without_a_document_the_defaults_serve_the_tiny_model_on_loopback() -> None:
    config = load_config(None, {})
    assert config == Config()
    assert (config.model, config.host, config.port, config.metrics_port) == ("synthetic:tiny", "127.0.0.1", 8000, 9400)


def test_yaml_and_json_documents_are_read(path: Path) -> None:
    path.write_text("port: 9000\nmodel: /models/x\nlayers: '3-60'\n")
    config = load_config(path, {})
    assert (config.port, config.model, config.layers) == (9000, "/models/x", "3-60")
    path.write_text(json.dumps({"port": 9001, "device": "cpu"}))
    assert (load_config(path, {}).port, load_config(path, {}).device) == (9001, "cpu")


def test_flags_override_the_document_and_absent_flags_do_not(path: Path) -> None:
    path.write_text("port: 9000\nranks: 4\n")
    config = load_config(path, {"port": 7000, "ranks": None, "device": None})
    assert (config.port, config.ranks, config.device) == (7000, 4, "auto")


def test_an_empty_document_means_defaults(path: Path) -> None:
    path.write_text("# nothing yet\n")
    assert load_config(path, {}) == Config()


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"prot": 8000}, "prot: no such key"),
        ({"port": "http"}, r"port: .*valid integer.*got 'http'"),
        ({"port": 65536}, r"port: .*less than or equal to 65535, got 65536"),
        ({"ranks": 0}, r"ranks: .*greater than or equal to 1, got 0"),
        ({"ranks": 2.5}, r"ranks: .*integer.*got 2.5"),
        ({"device": "tpu"}, r"device: .*'auto', 'cpu' or 'cuda', got 'tpu'"),
        ({"model": 5}, r"model: .*valid string, got 5"),
        ({"layers": [3, 4]}, r"layers: .*valid string"),
        ({"default_timeout_seconds": 0}, r"default_timeout_seconds: .*greater than 0, got 0"),
        ({"max_step_requests": 257}, r"max_step_requests: .*less than or equal to 256, got 257"),
        ({"max_request_tokens": 9000}, r"max_request_tokens \(9000\) must not exceed max_step_tokens \(8192\)"),
        (
            {"max_queue_tokens": 100, "max_request_tokens": 101},
            r"max_request_tokens \(101\) must not exceed max_queue_tokens \(100\)",
        ),
    ],
)
def test_a_bad_value_is_refused_by_name(path: Path, document: dict[str, Any], message: str) -> None:
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=message):
        load_config(path, {})
    with pytest.raises(ConfigError, match=message):
        load_config(None, document)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"port": -1, "prot": 1, "log_level": "loud"})
    assert all(key in str(caught.value) for key in ("port:", "prot:", "log_level:"))


def test_limits_that_just_fit_are_accepted() -> None:
    config = load_config(None, {"max_request_tokens": 64, "max_step_tokens": 64, "max_queue_tokens": 64})
    assert config.max_request_tokens == 64


def test_a_missing_document_is_named(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*config.yaml: No such file"):
        load_config(path, {})


def test_a_document_that_is_no_yaml_is_named(path: Path) -> None:
    path.write_text("port: [8000")
    with pytest.raises(ConfigError, match=r"config.yaml is not YAML or JSON"):
        load_config(path, {})


def test_a_document_that_is_no_mapping_is_named(path: Path) -> None:
    path.write_text("- port\n- 8000\n")
    with pytest.raises(ConfigError, match="must be a mapping of keys, not list"):
        load_config(path, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, (3, 4, 5, 7, 8, 9)),
        ("3", (3,)),
        ("3-5", (3, 4, 5)),
        ("3,5,7-9", (3, 5, 7, 8, 9)),
        (" 9 , 3-4 ", (3, 4, 9)),
        ("4,4,3-5", (3, 4, 5)),
    ],
)
def test_layers_are_resolved(text: str | None, expected: tuple[int, ...]) -> None:
    assert parse_layers(text, (3, 4, 5, 7, 8, 9)) == expected


@pytest.mark.parametrize("text", ["", "3-", "-3", "a", "3..5", "3,,4", "3-4-5", "3.5"])
def test_malformed_layers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"layers: expected ids and ranges such as .*got"):
        parse_layers(text, (3, 4, 5))


@pytest.mark.parametrize("text", ["5-3", "0-1000000000"])
def test_empty_and_endless_ranges_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="empty or far too long"):
        parse_layers(text, (3, 4, 5))


def test_layers_the_checkpoint_lacks_are_named() -> None:
    with pytest.raises(ConfigError, match=r"layers: \[6\] are not MoE layers of the checkpoint; it has \[3, 4, 5, 7\]"):
        parse_layers("5-7", (3, 4, 5, 7))


def test_default_deadline_beyond_the_longest_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"default_timeout_seconds .* must not exceed max_timeout_seconds"):
        load_config(None, {"default_timeout_seconds": 20.0, "max_timeout_seconds": 10.0})


def test_one_layer_may_be_a_number_and_a_document_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("layers: 5\n")
    assert load_config(path, {}).layers == "5"
    path.write_bytes(b"layers: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not YAML or JSON"):
        load_config(path, {})
