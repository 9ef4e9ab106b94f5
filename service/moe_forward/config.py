"""The one configuration document: read once at start, frozen, unknown keys refused. Flags override it."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from moe_forward.errors import ConfigError

MIB = 1 << 20


class Config(BaseModel):
    """Everything that can be set. Each field says its unit in its name and its meaning in its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="moe-forward configuration")

    model: str = Field("synthetic:tiny", description="Checkpoint folder, or synthetic:NAME to make and serve a preset.")
    served_model_name: str | None = Field(None, description="Name in URLs and metrics; default: the folder's name.")
    layers: str | None = Field(None, description="Layers to serve, such as 3-60 or 3,5,7-9; default: every MoE layer.")
    on_load_scales: Literal["rtn", "search"] = Field(
        "rtn",
        description="Scales of experts quantized at start: amax / 7, or searched for less error at twice the work.",
    )

    ranks: int | None = Field(None, ge=1, le=1024, description="Ranks, one per GPU; default: all GPUs, or 2 on CPU.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes cuda where GPUs of compute capability 9.0 and the kernel library are there."
    )
    exchange: Literal["auto", "deepep", "nccl", "gloo", "local"] = Field(
        "auto", description="How tokens move between ranks; auto: local for one rank, gloo on CPU, deepep on GPUs."
    )
    experts: Literal["auto", "cutlass", "reference"] = Field(
        "auto", description="What computes the experts; auto: reference on CPU, cutlass on GPUs."
    )
    activation_scale: Literal["token", "token_group"] = Field(
        "token", description="Granularity of activation scales: one per token, or one per token and 128 channels."
    )
    rank_threads: int | None = Field(None, ge=1, description="CPU threads of a rank; default: cores / ranks.")

    ray_address: str | None = Field(
        None,
        pattern=r"^(auto|[^\s/]+:[0-9]{1,5})$",
        description="Running Ray cluster to join, auto or HOST:PORT of its GCS; default: a Ray of our own on loopback.",
    )
    allow_ray_without_token: bool = Field(
        False, description="The Ray cluster to join asks for no token: everybody who reaches it may run programs there."
    )
    remote_ranks_port: int = Field(
        0, ge=0, le=65535, description="TCP port on this node's address for ranks of other nodes; 0 takes a free one."
    )

    host: str = Field("127.0.0.1", description="Address the HTTP front end listens on.")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 takes a free one.")
    frontends: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that serve the HTTP port; one moves some 100 thousand bf16 tokens a second.",
    )
    metrics_port: int = Field(9400, ge=0, le=65535, description="Port of GET /metrics; 0 takes a free one.")
    admin_token_file: Path | None = Field(None, description="File with the bearer token of POST /v1/drain.")
    api_keys_file: Path | None = Field(
        None, description="File of API keys, NAME:KEY or KEY a line, re-read when it changes; none: nobody is asked."
    )
    allow_anonymous: bool = Field(
        False, description="Listen beyond loopback without API keys or client certificates, on a trusted network."
    )
    tls_certificate_file: Path | None = Field(
        None, description="PEM certificate chain of the HTTP port, re-read when it changes; none: no TLS."
    )
    tls_key_file: Path | None = Field(None, description="PEM private key of tls_certificate_file, not encrypted.")
    tls_client_ca_file: Path | None = Field(
        None, description="PEM certificates of who may sign clients' certificates; with it, every client needs one."
    )
    docs: bool = Field(True, description="Serve /docs and /openapi.json, to everybody, API keys or not.")

    max_step_tokens: int = Field(8192, ge=1, le=1 << 20, description="Rows of one step at most.")
    max_rank_tokens: int = Field(
        4096, ge=1, le=1 << 20, description="Rows a GPU rank forwards at once at most; steps with more go in chunks."
    )
    max_graph_tokens: int = Field(
        512, ge=0, le=1 << 20, description="Up to this many rows per GPU rank a step runs as a CUDA graph; 0: never."
    )
    phase_sample_steps: int = Field(
        32, ge=0, le=1 << 20, description="GPU ranks time the phases of one step in this many; 0: of none."
    )
    max_step_requests: int = Field(256, ge=1, le=256, description="Requests of one step at most.")
    max_wait_us: int = Field(200, ge=0, le=1_000_000, description="Longest wait for more requests of the same layer.")
    poll_us: int | None = Field(
        None,
        ge=0,
        le=100_000,
        description="How long after a message front ends, engine and ranks look for the next before they sleep, each "
        "on a core of its own; none: 1000 with GPUs, 0 without.",
    )
    max_steps_in_flight: int = Field(
        2, ge=1, le=4, description="Steps at the ranks at a time, so that the next one is there when one is done."
    )
    max_request_tokens: int = Field(4096, ge=1, le=1 << 20, description="Rows of one request at most.")
    max_body_bytes: int = Field(256 * MIB, ge=1024, description="Request body at most.")
    max_json_bytes: int = Field(
        1 * MIB, ge=1024, description="Request body in JSON at most; a JSON reply has at most half as many numbers."
    )
    max_queue_requests: int = Field(
        1024, ge=1, description="Requests waiting at most, and a quarter more of clients with few; else 429."
    )
    max_queue_tokens: int = Field(
        65536, ge=1, description="Rows waiting at most, and a quarter more of clients with few; else 429."
    )
    slab_bytes: int = Field(
        1024 * MIB, ge=1 * MIB, description="Shared memory of each front end for bodies and replies; GPU ranks pin it."
    )

    default_timeout_seconds: float = Field(30.0, gt=0, le=3600, description="Deadline where a request names none.")
    max_timeout_seconds: float = Field(600.0, gt=0, le=3600, description="Longest deadline a request may name.")
    body_timeout_seconds: float = Field(30.0, gt=0, description="Longest time to receive a body.")
    header_timeout_seconds: float = Field(
        10.0, gt=0, description="Longest time from a connection, or a further request's first byte, to its headers."
    )
    keep_alive_seconds: int = Field(
        5, ge=1, le=3600, description="Longest rest of a connection between two requests; clients should give up first."
    )
    max_connections: int = Field(
        8192, ge=1, le=1 << 20, description="Open HTTP connections of all front ends at most; more get 503."
    )
    max_header_bytes: int = Field(32768, ge=1024, le=1 << 20, description="Request line and headers at most.")
    step_timeout_seconds: float = Field(120.0, gt=0, description="A step that takes longer means a lost rank group.")
    silence_seconds: float = Field(
        10.0,
        ge=1,
        le=600,
        description="A rank (and its group), the engine or one of several front ends that gives no sign of life for so "
        "long is taken for lost, and replaced.",
    )
    start_timeout_seconds: float = Field(
        600.0, gt=0, description="The process ends when ranks or front ends are not ready by then."
    )
    drain_timeout_seconds: float = Field(30.0, ge=0, description="Longest wait for requests in flight on SIGTERM.")
    max_rank_restarts: int = Field(
        3, ge=0, description="Times in an hour that a lost rank group is started again; with one more loss it is over."
    )
    on_rank_loss: Literal["fail", "degrade"] = Field(
        "fail",
        description="After more losses than max_rank_restarts: give up (fail), or go on with the other ranks (degrade),"
        " with experts missing where the others' memory cannot hold all; replies then say so.",
    )

    expert_metrics: bool = Field(
        False, description="Count the tokens of every expert: a series for each layer and expert, 32768 at most."
    )
    trace_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^/?#\s]+(/[^?#\s]*)?$",
        description="URL of an OpenTelemetry collector that takes spans by OTLP over HTTP, such as "
        "http://collector:4318; none: no traces.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line logged.")
    log_format: Literal["text", "json"] = Field("text", description="One line of text or one JSON object a record.")

    @model_validator(mode="after")
    def _limits_fit(self) -> Config:
        if self.max_request_tokens > self.max_step_tokens:
            raise ValueError(
                f"max_request_tokens ({self.max_request_tokens}) must not exceed max_step_tokens "
                f"({self.max_step_tokens}): a request is never split over steps"
            )
        if self.max_request_tokens > self.max_queue_tokens:
            raise ValueError(
                f"max_request_tokens ({self.max_request_tokens}) must not exceed max_queue_tokens "
                f"({self.max_queue_tokens}): such a request could never be queued"
            )
        if self.frontends > self.max_connections:
            raise ValueError(
                f"max_connections ({self.max_connections}) must not be less than frontends ({self.frontends}), which "
                "share them"
            )
        if self.default_timeout_seconds > self.max_timeout_seconds:
            raise ValueError(
                f"default_timeout_seconds ({self.default_timeout_seconds:g}) must not exceed max_timeout_seconds "
                f"({self.max_timeout_seconds:g})"
            )
        return self

    @model_validator(mode="after")
    def _strangers_are_expected_or_kept_out(self) -> Config:
        known = self.api_keys_file is not None or self.tls_client_ca_file is not None
        if not (_is_loopback(self.host) or known or self.allow_anonymous):
            raise ValueError(
                f"host {self.host!r} is not loopback, so anybody who reaches it could send requests: set api_keys_file "
                "(or tls_client_ca_file), or allow_anonymous: true where the network lets only the right ones through"
            )
        return self

    @model_validator(mode="after")
    def _tls_is_complete(self) -> Config:
        if (self.tls_certificate_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_certificate_file and tls_key_file must be set together")
        if self.tls_client_ca_file is not None and self.tls_certificate_file is None:
            raise ValueError("tls_client_ca_file needs tls_certificate_file and tls_key_file")
        return self

    @field_validator("served_model_name")
    @classmethod
    def _name_is_one_part_of_a_path(cls, value: str | None) -> str | None:
        if value is not None and (not value.isprintable() or "/" in value or value.strip() in ("", ".", "..")):
            raise ValueError("must be printable and hold no '/', since it stands in the path /v2/models/{model}")
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _one_layer_is_a_number_in_yaml(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost may be anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_config(path: Path | None, overrides: dict[str, Any]) -> Config:
    """Read the YAML or JSON document at `path` (none: defaults) and lay `overrides` over it.

    overrides: field name -> value; values of None are ignored.
    Returns: the frozen configuration.
    Raises: ConfigError naming the key, what was expected and what came.
    """
    document: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text())  # JSON is YAML
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"the configuration {path} is not YAML or JSON: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"the configuration {path} must be a mapping of keys, not {type(loaded).__name__}")
        document = loaded or {}
    document |= {key: value for key, value in overrides.items() if value is not None}
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'configuration'}: {item['msg']}, got {item['input']!r}"
            if item["type"] != "extra_forbidden"
            else f"{'.'.join(str(part) for part in item['loc'])}: no such key"
            for item in error.errors()
        )
        raise ConfigError(f"bad configuration: {problems}") from error


def parse_layers(text: str | None, available: tuple[int, ...]) -> tuple[int, ...]:
    """Resolve a `layers` setting such as "3-60" or "3,5,7-9" against the layers a checkpoint has.

    Returns: ids ascending; all of `available` for None.
    Raises: ConfigError for a malformed range or a layer that is not an MoE layer of the checkpoint.
    """
    if text is None:
        return available
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"layers: expected ids and ranges such as 3-60 or 3,5,7-9, got {text!r}")
        low, high = int(first), int(last or first)
        if high < low or high - low > 100_000:
            raise ConfigError(f"layers: the range {part.strip()!r} is empty or far too long")
        chosen.update(range(low, high + 1))
    missing = sorted(chosen - set(available))
    if missing:
        raise ConfigError(f"layers: {missing[:5]} are not MoE layers of the checkpoint; it has {list(available)[:70]}")
    return tuple(sorted(chosen))
