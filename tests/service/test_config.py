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


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "head.ray.svc:6379", "[fd00::1]:6379"])
def test_a_running_ray_is_named_by_address(address: str) -> None:
    assert load_config(None, {"ray_address": address}).ray_address == address


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "10.0.0.1", "", "local", "host:port"])
def test_what_is_no_address_of_a_ray_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="ray_address"):
        load_config(None, {"ray_address": address})


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


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert load_config(None, {"host": host}).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "moe.example", ""])
def test_beyond_loopback_strangers_are_kept_out_or_expected(host: str) -> None:
    with pytest.raises(ConfigError, match=r"is not loopback.*set api_keys_file .*or allow_anonymous: true"):
        load_config(None, {"host": host})
    tls = {"tls_certificate_file": "/c", "tls_key_file": "/k"}
    with pytest.raises(ConfigError, match="is not loopback"):
        load_config(None, {"host": host, **tls})
    for enough in ({"allow_anonymous": True}, {"api_keys_file": "/keys"}, {**tls, "tls_client_ca_file": "/ca"}):
        assert load_config(None, {"host": host, **enough}).host == host


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"tls_certificate_file": "/c"}, "tls_certificate_file and tls_key_file must be set together"),
        ({"tls_key_file": "/k"}, "tls_certificate_file and tls_key_file must be set together"),
        ({"tls_client_ca_file": "/ca"}, "tls_client_ca_file needs tls_certificate_file and tls_key_file"),
    ],
)
def test_tls_is_set_completely(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, document)


@pytest.mark.parametrize("name", ["a/b", "/", "", " ", ".", "..", "a\nb"])
def test_a_model_name_that_no_path_can_hold_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"served_model_name: .*must be printable and hold no '/'"):
        load_config(None, {"served_model_name": name})


@pytest.mark.parametrize("name", ["DeepSeek-R1", "a model", "a%2Fb", "modèle:1"])
def test_other_model_names_are_taken(name: str) -> None:
    assert load_config(None, {"served_model_name": name}).served_model_name == name


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
