"""A report as text: a line for each point, and what explains it below."""

from __future__ import annotations

from collections.abc import Iterator

from moe_forward.bench.report import Report, Row

LATENCIES = ("p50", "p90", "p95", "p99", "p99_9", "max", "mean", "stdev")
NOTES = {
    "closed": "closed loop: latency from sending; a service that stalls also stops its callers (--rate: an open loop)",
    "open": "open loop: latency from the intended send time, so that a stall counts for all who would have met it",
}
MIB = 1 << 20


def table(report: Report) -> str:
    """Return the rows as lines."""
    titles = ["req/s", "tokens/s", *(f"{name.replace('_', '.')} ms" for name in LATENCIES)]
    lines = [NOTES[loop] for loop in dict.fromkeys(row.loop for row in report.rows)]
    lines.append(f"{'tokens':>7}{'load':>10}{''.join(f'{title:>10}' for title in titles)}  errors")
    for row in report.rows:
        lines.append(_line(row))
        lines += [f"{'':>9}{detail}" for detail in _details(row)]
    return "\n".join(lines)


def _line(row: Row) -> str:
    load = f"{row.connections}" if row.rate is None else f"{row.rate:g}/s"
    latency = "".join(
        f"{row.latency_milliseconds[name]:>10.2f}" if row.latency_milliseconds else f"{'-':>10}" for name in LATENCIES
    )
    errors = ", ".join(f"{code} {count}" for code, count in {**row.errors, **row.refusals}.items()) or "none"
    return f"{row.size:>7}{load:>10}{row.requests_per_second:>10.1f}{row.tokens_per_second:>10.0f}{latency}  {errors}"


def _details(row: Row) -> Iterator[str]:
    if len(row.mix) > 1:
        for tokens, latency in row.latency_milliseconds_by_tokens.items():
            yield f"{tokens} tokens: p50 {latency['p50']:.2f}, p99 {latency['p99']:.2f} ms"
    parts = {"wait": row.wait_milliseconds, "queue": row.queue_milliseconds, "step": row.step_milliseconds}
    parts["rest"] = row.rest_milliseconds
    if row.loop == "closed":
        parts.pop("wait")
    told = {name: part for name, part in parts.items() if part}
    if row.queue_milliseconds:
        means = " + ".join(f"{name} {part['mean']:.2f}" for name, part in told.items())
        medians = ", ".join(f"{name} {part['p50']:.2f}" for name, part in told.items())
        yield f"mean {row.latency_milliseconds['mean']:.2f} = {means} ms; p50 of each: {medians} ms"
    elif row.latency_milliseconds:
        yield "queue and step: the replies have no Server-Timing"
    sent, received = row.sent_bytes_per_second / MIB, row.received_bytes_per_second / MIB
    traffic = f"{sent:.1f} MiB/s sent, {received:.1f} MiB/s received"
    yield traffic if row.rate is None else f"{traffic}; {row.late} late, {row.unsent} unsent, {row.refused} refused"
    if row.objective is not None:
        good = row.objective
        yield f"within {good.milliseconds:g} ms: {good.requests_per_second:.1f} req/s, {good.share:.2%} of all"
    generator = row.generator
    known = f"CPU {generator.cpu_share:.0%} of {generator.processes}"
    if generator.lag_milliseconds:
        known += f", lag p99 {generator.lag_milliseconds['p99']:.2f} ms"
    if generator.ceiling_requests_per_second is not None and generator.ceiling_share is not None:
        known += f", ceiling {generator.ceiling_requests_per_second:.0f} req/s ({generator.ceiling_share:.0%} used)"
    yield f"generator: {known}"
    for warning in row.warnings:
        yield f"WARNING: {warning}"
