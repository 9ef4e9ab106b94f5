"""Many requests become one step: same layer, small ones first, in fair order, bounded in rows, requests and time."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from moe_forward.batcher.admission import IN_TIME_PART, Backlog, longest_wait_seconds, most_step_tokens, wait_seconds
from moe_forward.batcher.ahead import COPY_LEAD_SECONDS, LEAD_SECONDS, Ahead
from moe_forward.batcher.fairness import Clients, FairQueue
from moe_forward.batcher.limits import BatchLimits, Key, Queued
from moe_forward.batcher.line import Line
from moe_forward.batcher.pace import Pace
from moe_forward.messages import Ticket

LARGE_TURN_STEPS = 4.0
"""Full steps that large requests wait at most while small ones go before them: a fifth of the time is theirs."""
LARGE_SLOWDOWN = 1 + 1 / LARGE_TURN_STEPS
"""How much longer small requests wait for that."""


class Batcher:
    """The queue of one engine, a line for each layer. pace: learns from finished steps. requests, tokens: that wait."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._clients = Clients(limits)
        self._lines: dict[int, Line] = {}
        self._busy: dict[int, Line] = {}  # those where something waits
        self._full: set[int] = set()  # layers that fill a step
        self._items: dict[Key, Queued] = {}
        self._deadlines: list[tuple[float, Key]] = []
        self._large_since = math.inf
        self._large_went_last = False
        self._small_requests = 0
        self.pace = Pace()
        self.requests = 0
        self.tokens = 0

    def add(self, request: Ticket, now: float) -> bool:
        """Queue a request; False when the queue has no room for it."""
        if not self._clients.may_queue(request.client, request.tokens, self.requests, self.tokens):
            return False
        item = Queued(request, now, self._limits.is_large(request.tokens))
        if item.large:
            self._large_since = min(self._large_since, now)
        else:
            self._small_requests += 1
        self._items[item.key] = item
        self._clients.joined(item)
        line = self._busy[request.layer] = self._line(request.layer)
        if line.add(item):
            self._full.add(request.layer)
        self.requests += 1
        self.tokens += request.tokens
        if request.deadline_seconds < math.inf:
            self._remember_deadline(request.deadline_seconds, item.key)
        return True

    def late_seconds(self, request: Ticket, now: float, ahead: Ahead | None = None) -> float | None:
        """Return in how many seconds a request would be answered if that is too late; None: in time, or not known.

        ahead: as for `next_step`. Who finds the queue empty is never late: that is how a new pace is learned.
        """
        left_seconds = request.deadline_seconds - now
        if not self.requests or not 0 < left_seconds < math.inf:
            return None
        if self.in_time_at_worst(request, now, ahead):
            return None
        most_tokens = most_step_tokens(left_seconds, self._limits, self.pace)
        seconds = wait_seconds(self._backlog(request), most_tokens, self._limits.max_step_requests, self.pace)
        if seconds is None or (ahead is not None and ahead.end_seconds == math.inf):
            return None
        if ahead is not None:
            seconds += max(0.0, ahead.end_seconds - now)
        return seconds if seconds > IN_TIME_PART * left_seconds else None

    def in_time_at_worst(self, request: Ticket, now: float, ahead: Ahead | None = None) -> bool:
        """Tell whether a request is in time whatever the fair order says: a short sum, which is enough for most."""
        seconds = longest_wait_seconds(
            self.requests + 1, self.tokens + request.tokens, len(self._busy) + 1, self._limits, self.pace
        )
        if ahead is not None:
            seconds += max(0.0, ahead.end_seconds - now)
        return seconds <= IN_TIME_PART * (request.deadline_seconds - now)

    def drain_seconds(self, client: int) -> float | None:
        """Return how long a client's waiting requests need to leave the queue; None before any step has finished."""
        rate = self.pace.tokens_per_second
        return (self._clients.drain_tokens(client) or self.tokens) / rate if rate else None

    def cancel(self, front: int, request: int) -> Queued | None:
        """Take one request out of the queue; None when it is not (or no longer) there."""
        item = self._items.get((front, request))
        if item is not None:
            self._remove(item)
        return item

    def drop_front(self, front: int) -> list[Queued]:
        """Take out everything of a front end that is gone."""
        return self._take(lambda item: item.request.front == front)

    def drop_all(self) -> list[Queued]:
        """Take out everything."""
        return self._take(lambda item: True)

    def expire(self, now: float) -> list[Queued]:
        """Take out every request whose deadline has passed."""
        expired = []
        while self._soonest_deadline() <= now:
            expired.append(self._items[heapq.heappop(self._deadlines)[1]])
            self._remove(expired[-1])
        return expired

    def next_step(self, now: float, ahead: Ahead | None = None) -> list[Queued]:
        """Take the requests of the next step. ahead: what is at the ranks, None while they are free.

        While ranks are free, a line goes when it is full or has waited enough (`patience`). While they are not, a step
        that could still grow leaves as late as it can without having the ranks wait: sent earlier it would not begin
        earlier, and who came meanwhile would need a step of its own. One that is full goes at once. One of large
        requests, however, goes late behind another such step or before small requests that wait: what is sent cannot be
        overtaken, and small ones shall not be delayed by more than one large step.

        Small requests go before large ones, and into a step without them. But when large ones have waited for the time
        of four full steps since one of them went, or the first of them for half its time to the deadline, one of their
        steps goes first, which small ones of its layer may join. Among small ones, and among large ones, it is the turn
        of the client that was given least; the step is filled from its line.

        Returns: requests of one layer, empty when nothing is due.
        """
        hurry = _hurry_seconds(ahead)
        if now < hurry and not self._full:
            return []
        small = [line for line in self._busy.values() if _small_ready(line, hurry) <= now]
        large = [line for line in self._busy.values() if self._large_ready(line, ahead) <= now]
        if large and not small and self._small_requests and now >= hurry:
            small = [line for line in self._busy.values() if line.small.requests]  # rather than wait behind a large one
        if small and self.requests > self._small_requests:  # a large step in place of this one may be early
            large = [line for line in self._busy.values() if line.large_due_seconds() <= now]
        if large:
            line = min(large, key=lambda line: line.large.place())
            if not small or self._is_turn_of_large(line.large.first(), now):
                return self._take_large(line, now)
        if small:
            self._large_went_last = False
            return self._fill([], min(small, key=lambda line: line.small.place()).small)
        return []

    def wake_seconds(self, now: float, ahead: Ahead | None = None, room: bool = True) -> float:
        """Return when to look again without arrivals: a step falls due or a deadline passes.

        ahead: as for `next_step`. room: whether a step could go at all.
        """
        wake = self._soonest_deadline()
        if not room or not self._busy:
            return wake
        hurry = _hurry_seconds(ahead)
        if now < hurry and not self._full:
            return min(wake, hurry)  # nothing can go before; which line will be due is a question for then
        for line in self._busy.values():
            wake = min(wake, _small_ready(line, hurry), self._large_ready(line, ahead))
        return wake

    def finished(self, layer: int, tokens: int, sent_seconds: float, step_seconds: float, now: float) -> None:
        """Learn from a finished step. sent_seconds: when it left. step_seconds: since it could begin."""
        self.pace.finished(tokens, step_seconds)
        self._line(layer).company.answered(sent_seconds, now)

    def _backlog(self, request: Ticket) -> Backlog:
        tokens = before = self.tokens + request.tokens
        if not self._limits.is_large(request.tokens):  # or all that waits goes first
            small = self._clients.small_tokens_before(request.client, request.tokens)
            before = min(tokens, math.ceil(LARGE_SLOWDOWN * small))
        lines = len(self._busy) + (request.layer not in self._busy)
        return Backlog(self.requests + 1, tokens, lines, before)

    def _line(self, layer: int) -> Line:
        line = self._lines.get(layer)
        if line is None:
            line = self._lines[layer] = Line(self._clients, self._limits, self.pace)
        return line

    def _large_ready(self, line: Line, ahead: Ahead | None) -> float:
        due = line.large_due_seconds()
        full = due == -math.inf
        if ahead is None or (full and not ahead.large and not self._small_requests):
            return due
        lead_seconds = COPY_LEAD_SECONDS if full and not self._small_requests else LEAD_SECONDS
        return max(due, ahead.leave_seconds(lead_seconds))

    def _is_turn_of_large(self, first: Queued, now: float) -> bool:
        if self._large_went_last:
            return False
        halfway = (first.arrived_seconds + first.request.deadline_seconds) / 2
        full_step_seconds = self.pace.step_seconds(self._limits.max_step_tokens) or math.inf
        return now >= min(halfway, self._large_since + LARGE_TURN_STEPS * full_step_seconds)

    def _take_large(self, line: Line, now: float) -> list[Queued]:
        step: list[Queued] = []
        self._serve(step, line.large.first())
        self._fill(step, line.small)
        self._fill(step, line.large)
        self._large_went_last = True
        self._large_since = now if self.requests > self._small_requests else math.inf
        return step

    def _fill(self, step: list[Queued], queue: FairQueue) -> list[Queued]:
        """Serve from `queue` while it fits; who does not fit is not overtaken."""
        tokens = sum(item.request.tokens for item in step)
        given_seconds = min((item.given_seconds for item in step), default=math.inf)
        most_tokens = most_step_tokens(given_seconds, self._limits, self.pace)
        while queue.requests and len(step) < self._limits.max_step_requests:
            item = queue.first()
            tokens += item.request.tokens
            if item.given_seconds < given_seconds:
                given_seconds = item.given_seconds
                most_tokens = most_step_tokens(given_seconds, self._limits, self.pace)
            if step and tokens > most_tokens:
                break
            self._serve(step, item)
        return step

    def _serve(self, step: list[Queued], item: Queued) -> None:
        step.append(item)
        self._clients.charge(item)
        self._remove(item)

    def _take(self, unwanted: Callable[[Queued], bool]) -> list[Queued]:
        taken = [item for item in self._items.values() if unwanted(item)]
        for item in taken:
            self._remove(item)
        return taken

    def _remove(self, item: Queued) -> None:
        del self._items[item.key]
        line = self._busy[item.request.layer]
        line.remove(item)
        if item.request.layer in self._full and not line.is_full:
            self._full.discard(item.request.layer)
        if not line:
            del self._busy[item.request.layer]
        self._clients.left(item)
        self.requests -= 1
        self.tokens -= item.request.tokens
        if not item.large:
            self._small_requests -= 1
        elif self.requests == self._small_requests:
            self._large_since = math.inf

    def _remember_deadline(self, deadline_seconds: float, key: Key) -> None:
        heapq.heappush(self._deadlines, (deadline_seconds, key))
        if len(self._deadlines) > 2 * self.requests + 64:  # those of requests that left long before
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._items]
            heapq.heapify(self._deadlines)

    def _soonest_deadline(self) -> float:
        while self._deadlines and self._deadlines[0][1] not in self._items:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else math.inf


def _hurry_seconds(ahead: Ahead | None) -> float:
    return -math.inf if ahead is None else ahead.hurry_seconds


def _small_ready(line: Line, hurry: float) -> float:
    due = line.small_due_seconds()
    return due if due == -math.inf else max(due, hurry)
