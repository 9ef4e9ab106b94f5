"""PromQL over the service's metrics, with the dashboard's variables in it.

Every rate is over `$__rate_interval`. `instance` is one service: its ranks are numbered from 0, so that ranks of two
services only differ by it.
"""

from __future__ import annotations

from panels import Query

SERVICE = 'namespace=~"$namespace", instance=~"$instance"'
MODEL = f'{SERVICE}, model=~"$model"'
RANK = f'{SERVICE}, rank=~"$rank"'
MODEL_RANK = f'{MODEL}, rank=~"$rank"'
RECORDED = 'namespace=~"$namespace", model=~"$model"'  # the recording rules add the instances of a job up


def rate(name: str, selector: str, by: str = "") -> str:
    """Return the rate per second of a counter, added up over everything but the labels `by`."""
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} (rate(moe_forward_{name}{{{selector}}}[$__rate_interval]))"


def mean(name: str, selector: str, by: str = "") -> str:
    """Return the mean of a histogram's observations."""
    return f"{rate(name + '_sum', selector, by)} / {rate(name + '_count', selector, by)}"


def quantile(share: float, name: str, selector: str, by: str = "") -> str:
    """Return a quantile of a histogram's observations."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {rate(name + '_bucket', selector, labels)})"


def quantiles(name: str, selector: str) -> tuple[Query, ...]:
    """Return p50, p95 and p99 of a histogram."""
    return tuple(Query(quantile(share, name, selector), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99))


def gauge(name: str, selector: str) -> str:
    """Return a gauge as it is."""
    return f"moe_forward_{name}{{{selector}}}"


def recorded(name: str) -> str:
    """Return a series of the recording rules."""
    return f"moe_forward:{name}{{{RECORDED}}}"


def error_share(codes: str) -> str:
    """Return the share of requests that ended with such a status; 0 where none did."""
    selector = f'{MODEL}, code=~"{codes}"'
    return f"({rate('requests_total', selector)} or vector(0)) / {rate('requests_total', MODEL)}"
