"""The dashboard's rows about requests: what comes in, how long it takes, how it becomes steps."""

from __future__ import annotations

from expressions import MODEL, RANK, SERVICE, error_share, gauge, mean, quantile, quantiles, rate
from panels import Panel, Query, Row

TOKENS_PER_SECOND = "suffix: tokens/s"


def traffic() -> Row:
    """What comes in."""
    return Row(
        "Traffic",
        (
            Panel(
                "Requests",
                "Forward requests a second that ended, all statuses.",
                "reqps",
                (Query(rate("requests_total", MODEL)),),
                "stat",
                width=4,
                height=4,
            ),
            Panel(
                "Tokens",
                "Tokens a second of answered requests.",
                TOKENS_PER_SECOND,
                (Query(rate("tokens_total", MODEL)),),
                "stat",
                width=4,
                height=4,
            ),
            Panel(
                "p99",
                "99 of 100 requests took less than this, first header to last byte.",
                "s",
                (Query(quantile(0.99, "request_duration_seconds", MODEL)),),
                "stat",
                width=4,
                height=4,
                warning=0.5,
                bad=1,
            ),
            Panel(
                "Server errors",
                "Share of requests that ended with 5xx.",
                "percentunit",
                (Query(error_share("5..")),),
                "stat",
                width=4,
                height=4,
                warning=0.001,
                bad=0.01,
            ),
            Panel(
                "Ranks that are not ready",
                "A service answers only while all of its ranks are ready.",
                "none",
                (Query(f"count({gauge('rank_up', RANK)} == 0) or vector(0)"),),
                "stat",
                width=4,
                height=4,
                bad=1,
            ),
            Panel(
                "In flight",
                "Forward requests that are being served: receiving, waiting, computing or sending.",
                "none",
                (Query(f"sum({gauge('inflight_requests', MODEL)})"),),
                "stat",
                width=4,
                height=4,
            ),
            Panel(
                "Request rate by status",
                "Forward requests that ended, by HTTP status; 499: the client went away.",
                "reqps",
                (Query(rate("requests_total", MODEL, "code"), "{{code}}"),),
                "stacked",
            ),
            Panel(
                "Errors",
                "Share of requests that were refused for what they ask (4xx), and that the service could not answer "
                "(5xx). 429 means that the queue is full.",
                "percentunit",
                (Query(error_share("4.."), "4xx"), Query(error_share("5.."), "5xx")),
            ),
            Panel(
                "Request rate by route",
                "The product's own call and the Open Inference Protocol.",
                "reqps",
                (Query(rate("requests_total", MODEL, "route"), "{{route}}"),),
                "stacked",
            ),
            Panel(
                "Tokens a second",
                "Tokens of answered requests, and those of them whose fp8 scales had to be made again because they "
                "came in the other granularity.",
                TOKENS_PER_SECOND,
                (
                    Query(rate("tokens_total", MODEL, "model"), "{{model}}"),
                    Query(rate("requantized_tokens_total", MODEL, "model"), "{{model}}, quantized again"),
                ),
            ),
            Panel(
                "Body bytes",
                "Bytes of request bodies a second, by encoding.",
                "Bps",
                (Query(rate("request_body_bytes_sum", SERVICE, "encoding"), "{{encoding}}"),),
                "stacked",
            ),
            Panel(
                "Body size",
                "Median and p99 of a request body, by encoding.",
                "bytes",
                tuple(
                    Query(
                        quantile(share, "request_body_bytes", SERVICE, "encoding"), f"{{{{encoding}}}} p{share * 100:g}"
                    )
                    for share in (0.5, 0.99)
                ),
            ),
        ),
    )


def latency() -> Row:
    """How long it takes."""
    return Row(
        "Latency",
        (
            Panel(
                "Request latency",
                "Forward request, first header to last byte, every status.",
                "s",
                quantiles("request_duration_seconds", MODEL),
                bad=0.5,
            ),
            Panel(
                "Request latency, distribution",
                "How many requests took how long.",
                "s",
                (
                    Query(
                        f"sum by (le) (increase({gauge('request_duration_seconds_bucket', MODEL)}[$__rate_interval]))",
                        "{{le}}",
                    ),
                ),
                "heatmap",
            ),
            Panel(
                "p99 by route",
                "The same request costs more in JSON and in the Open Inference Protocol.",
                "s",
                (Query(quantile(0.99, "request_duration_seconds", MODEL, "route"), "{{route}}"),),
            ),
            Panel(
                "Queue wait",
                "From a decoded request to the start of its step.",
                "s",
                quantiles("queue_duration_seconds", MODEL),
            ),
            Panel(
                "Decode time",
                "Body to checked tensors, mean by encoding.",
                "s",
                (Query(mean("decode_duration_seconds", SERVICE, "encoding"), "{{encoding}}"),),
            ),
            Panel(
                "Encode time",
                "Output to reply body, mean by encoding.",
                "s",
                (Query(mean("encode_duration_seconds", SERVICE, "encoding"), "{{encoding}}"),),
            ),
        ),
    )


def queue() -> Row:
    """How requests become steps."""
    return Row(
        "Queue and batches",
        (
            Panel(
                "Requests waiting",
                "In the engine's queue; max_queue_requests is the end.",
                "none",
                (Query(f"sum by (instance, model) ({gauge('queue_requests', MODEL)})", "{{instance}} {{model}}"),),
            ),
            Panel(
                "Tokens waiting",
                "In the engine's queue; max_queue_tokens is the end.",
                "none",
                (Query(f"sum by (instance, model) ({gauge('queue_tokens', MODEL)})", "{{instance}} {{model}}"),),
            ),
            Panel(
                "Steps a second",
                "One step is one layer's forward over all ranks.",
                "suffix: steps/s",
                (Query(rate("batch_tokens_count", MODEL, "instance, model"), "{{instance}} {{model}}"),),
            ),
            Panel(
                "Tokens in a step",
                "Mean, median and p99 of the tokens that were forwarded together.",
                "none",
                (
                    Query(mean("batch_tokens", MODEL), "mean"),
                    Query(quantile(0.5, "batch_tokens", MODEL), "p50"),
                    Query(quantile(0.99, "batch_tokens", MODEL), "p99"),
                ),
            ),
            Panel(
                "Tokens in a step, distribution",
                "How many steps had how many tokens.",
                "none",
                (Query(f"sum by (le) (increase({gauge('batch_tokens_bucket', MODEL)}[$__rate_interval]))", "{{le}}"),),
                "heatmap",
            ),
            Panel(
                "Requests in a step",
                "Mean and p99 of the requests that were forwarded together; always 1 means that batching does nothing.",
                "none",
                (Query(mean("batch_requests", MODEL), "mean"), Query(quantile(0.99, "batch_requests", MODEL), "p99")),
            ),
        ),
    )
