"""The dashboard's rows about ranks: who computes what, what they hold and send, what goes wrong."""

from __future__ import annotations

from expressions import MODEL, MODEL_RANK, RANK, SERVICE, gauge, rate, recorded
from panels import Panel, Query, Row

TOKENS_PER_SECOND = "suffix: tokens/s"
ROWS_PER_SECOND = "suffix: rows/s"


def ranks() -> Row:
    """Who does the work, and how evenly."""
    by_rank = "instance, rank"
    timed_steps = f"max by ({by_rank}) ({rate('phase_duration_seconds_count', MODEL_RANK, by_rank + ', phase')})"
    in_steps = f"scalar(max({rate('phase_duration_seconds_count', MODEL_RANK, 'phase')}))"
    return Row(
        "Ranks and experts",
        (
            Panel(
                "Rank state",
                "Ready, or not: starting, lost, or never seen again.",
                "none",
                (Query(f"min by ({by_rank}) ({gauge('rank_up', RANK)})", "{{instance}} rank {{rank}}"),),
                "states",
                maximum=1,
            ),
            Panel(
                "Rows a rank computes",
                "Rows of its experts a second: a token counts once for each of its experts there.",
                ROWS_PER_SECOND,
                (Query(rate("rank_tokens_total", RANK, by_rank), "{{instance}} rank {{rank}}"),),
                "stacked",
            ),
            Panel(
                "Imbalance of ranks",
                "Rows of the busiest rank over the mean of all: 1 is even. A step waits for its busiest rank. By "
                "layer: of the layer's last step; all layers: of the rate.",
                "none",
                (
                    Query(
                        f"max by (instance) ({rate('rank_tokens_total', SERVICE, by_rank)}) / "
                        f"avg by (instance) ({rate('rank_tokens_total', SERVICE, by_rank)})",
                        "{{instance}} all layers",
                    ),
                    Query(f"max by (layer) ({gauge('expert_load_imbalance_ratio', SERVICE)})", "layer {{layer}}"),
                ),
                warning=2,
            ),
            Panel(
                "Phases of a step, rank $rank",
                "Mean time of a step on this rank by phase. GPU ranks time one step in phase_sample_steps. Dispatch "
                "and combine hold the wait for the other ranks.",
                "s",
                (Query(f"{rate('phase_duration_seconds_sum', MODEL_RANK, 'phase')} / {in_steps}", "{{phase}}"),),
                "stacked",
                repeat="rank",
            ),
            Panel(
                "Time of a step by rank",
                "Mean over all phases: the ranks are together when a step ends, so one that stands out waits less, or "
                "computes more.",
                "s",
                (
                    Query(
                        f"{rate('phase_duration_seconds_sum', MODEL_RANK, by_rank)} / {timed_steps}",
                        "{{instance}} rank {{rank}}",
                    ),
                ),
            ),
            Panel(
                "Busiest expert",
                "Tokens of a layer's busiest expert over the mean of its experts. Needs expert_metrics.",
                "none",
                (
                    Query(
                        f"max by (layer) ({rate('expert_tokens_total', SERVICE, 'layer, expert')}) / "
                        f"avg by (layer) ({rate('expert_tokens_total', SERVICE, 'layer, expert')})",
                        "layer {{layer}}",
                    ),
                ),
            ),
            Panel(
                "Expert load",
                "The 16 experts with the most tokens a second. Needs expert_metrics.",
                TOKENS_PER_SECOND,
                (
                    Query(
                        f"topk(16, {rate('expert_tokens_total', SERVICE, 'layer, expert')})",
                        "layer {{layer}} expert {{expert}}",
                    ),
                ),
                "bars",
            ),
        ),
    )


def devices() -> Row:
    """What the ranks hold and send."""
    return Row(
        "GPU and exchange",
        (
            Panel(
                "GPU memory",
                "Of each rank's GPU when it became ready: weights, buffers, and what is free. Absent on CPU.",
                "bytes",
                (
                    Query(
                        f"sum by (instance, rank, kind) ({gauge('gpu_memory_bytes', RANK)})",
                        "{{instance}} rank {{rank}} {{kind}}",
                    ),
                ),
                "stacked",
            ),
            Panel(
                "Exchange",
                "Bytes a second that ranks get from other ranks to compute (dispatch) and send back to them (combine).",
                "Bps",
                (Query(rate("exchange_bytes_total", RANK, "direction"), "{{direction}}"),),
            ),
            Panel(
                "Exchange by rank",
                "Dispatch and combine together.",
                "Bps",
                (Query(rate("exchange_bytes_total", RANK, "instance, rank"), "{{instance}} rank {{rank}}"),),
            ),
        ),
    )


def reliability() -> Row:
    """What went wrong, and how much of that is allowed."""
    return Row(
        "Reliability and SLO",
        (
            Panel(
                "Service state",
                "Down while a rank is missing: every request gets 503, or a smaller group answers (on_rank_loss).",
                "none",
                (Query(f"1 - max by (instance, model) ({gauge('degraded', MODEL)})", "{{instance}} {{model}}"),),
                "states",
                maximum=1,
                width=24,
                height=4,
            ),
            Panel(
                "Rejections by reason",
                "Requests refused for a reason other than their content.",
                "reqps",
                (Query(rate("rejected_total", SERVICE, "reason"), "{{reason}}"),),
                "stacked",
            ),
            Panel(
                "Restarts of ranks",
                "Times ranks were started again since their service started; they restart as a group. After "
                "max_rank_restarts within an hour the service gives up, or goes on with fewer ranks (on_rank_loss).",
                "none",
                (
                    Query(f"max by (instance) ({gauge('rank_restarts_total', RANK)})", "{{instance}}"),
                    Query(f"max by (instance) ({gauge('placement_generation', SERVICE)})", "{{instance}} group number"),
                ),
            ),
            Panel(
                "Routes without an expert",
                "Routes to experts that no rank holds (on_rank_loss degrade): they added nothing to the replies.",
                "ops",
                (Query(rate("dropped_assignments_total", MODEL, "instance, model"), "{{instance}} {{model}}"),),
            ),
            Panel(
                "Changes of which ranks hold which experts",
                "Since the service started: groups with fewer ranks or experts than before (degraded), with more "
                "(restored), and attempts that failed.",
                "none",
                (
                    Query(
                        f"sum by (instance, result) ({gauge('rebalances_total', SERVICE)})", "{{instance}} {{result}}"
                    ),
                ),
            ),
            Panel(
                "Start-up",
                "Loading a rank's weights, and from the start of the front end until the rank was ready.",
                "s",
                (
                    Query(
                        f"max by (instance, rank) ({gauge('weights_load_duration_seconds', RANK)})",
                        "{{instance}} rank {{rank}} weights",
                    ),
                    Query(
                        f"max by (instance, rank) ({gauge('startup_duration_seconds', RANK)})",
                        "{{instance}} rank {{rank}} ready",
                    ),
                ),
            ),
            Panel(
                "Error budget burn",
                "Server errors over what the SLO allows (99.9 % of requests without a 5xx), over four windows: 1 uses "
                "the budget up exactly. Alerts: above 14.4 in 5 m and 1 h, above 6 in 30 m and 6 h.",
                "none",
                tuple(
                    Query(recorded(f"slo_burn:ratio_{window}"), f"{{{{model}}}} {window}")
                    for window in ("5m", "30m", "1h", "6h")
                ),
                warning=6,
                bad=14.4,
            ),
            Panel(
                "Error ratio, recorded",
                "Share of requests that ended with 5xx, as the alerts see it.",
                "percentunit",
                tuple(
                    Query(recorded(f"request_errors:ratio_{window}"), f"{{{{model}}}} {window}")
                    for window in ("5m", "1h", "6h")
                ),
            ),
            Panel(
                "Latency over 5 minutes, recorded",
                "Quantiles of all instances of a job together, as the alert on p99 sees them.",
                "s",
                tuple(
                    Query(recorded(f"request_duration_seconds:{share}_5m"), f"{{{{model}}}} {share}")
                    for share in ("p50", "p95", "p99")
                ),
                bad=0.5,
            ),
            Panel(
                "Versions",
                "Services by version, exchange and kernel: several at once while a release rolls out.",
                "none",
                (
                    Query(
                        f"count by (version, torch, ray, backend, kernel) ({gauge('build_info', SERVICE)})",
                        "moe-forward {{version}}, torch {{torch}}, ray {{ray}}, {{backend}}, {{kernel}}",
                    ),
                ),
                "bars",
                width=24,
                height=4,
            ),
        ),
    )
