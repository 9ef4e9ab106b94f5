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
        layer, tokens = request.layer, request.tokens
        if not self._clients.may_queue(request.client, tokens, self.requests, self.tokens):
            return False
        item = Queued(request, now, self._limits.is_large(tokens))
        if item.large:
            self._large_since = min(self._large_since, now)
        else:
            self._small_requests += 1
        self._items[item.key] = item
        self._clients.joined(item)
        line = self._busy.get(layer)
        if line is None:
            line = self._busy[layer] = self._line(layer)
        if line.add(item):
            self._full.add(layer)
        self.requests += 1
        self.tokens += tokens
        if request.deadline_seconds < math.inf:
            heapq.heappush(self._deadlines, (request.deadline_seconds, item.key))
        return True

    def late_seconds(self, request: Ticket, now: float, ahead: Ahead | None = None) -> float | None:
        """Return in how many seconds a request would be answered if that is too late; None: in time, or not known.

        ahead: as for `next_step`. Who finds the queue empty is never late: that is how a new pace is learned.
        """
        if not self.requests:
            return None
        left_seconds = request.deadline_seconds - now
        if not 0 < left_seconds < math.inf:
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
        while self._deadlines and self._deadlines[0][0] <= now:
            item = self._items.get(heapq.heappop(self._deadlines)[1])
            if item is not None:
                expired.append(item)
                self._remove(item)
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
        late_enough = now >= hurry
        if not late_enough and not self._full:
            return []
        small, large = [], []
        for line in self._busy.values():
            small_due, large_due = line.due_seconds()
            if small_due == -math.inf or (late_enough and small_due <= now):
                small.append(line)
            if large_due <= now and self._large_ready(large_due, ahead) <= now:
                large.append(line)
        if large and not small and self._small_requests and late_enough:
            small = [line for line in self._busy.values() if line.small.requests]  # rather than wait behind a large one
        if small and self.requests > self._small_requests:  # a large step in place of this one may be early
            large = [line for line in self._busy.values() if line.due_seconds()[1] <= now]
        if large:
            line = large[0] if len(large) == 1 else min(large, key=lambda line: line.large.place())
            if not small or self._is_turn_of_large(line.large.first(), now):
                return self._take_large(line, now)
        if small:
            self._large_went_last = False
            line = small[0] if len(small) == 1 else min(small, key=lambda line: line.small.place())
            return self._fill([], line, line.small)
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
            small_due, large_due = line.due_seconds()
            wake = min(wake, _small_ready(small_due, hurry), self._large_ready(large_due, ahead))
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
            line = self._lines[layer] = Line(self._limits, self.pace)
        return line

    def _large_ready(self, due: float, ahead: Ahead | None) -> float:
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
        first = line.large.first()
        line.large.remove(first)
        self._clients.served(first)
        self._forget([first], line)
        step = self._fill([first], line, line.small)
        self._fill(step, line, line.large)
        self._large_went_last = True
        self._large_since = now if self.requests > self._small_requests else math.inf
        return step

    def _fill(self, step: list[Queued], line: Line, queue: FairQueue) -> list[Queued]:
        """Serve from `queue`, which is one of `line`, while it fits; who does not fit is not overtaken."""
        tokens, given_seconds = 0, math.inf
        for item in step:
            tokens += item.request.tokens
            given_seconds = min(given_seconds, item.given_seconds)
        surely_fit = min(self._limits.max_step_tokens, self.pace.fewest_tokens)  # whatever time was given
        before = len(step)
        while queue.requests and len(step) < self._limits.max_step_requests:
            item = queue.first()
            tokens += item.request.tokens
            if item.given_seconds < given_seconds:
                given_seconds = item.given_seconds
            if tokens > surely_fit and step and tokens > most_step_tokens(given_seconds, self._limits, self.pace):
                break
            queue.remove(item)
            self._clients.served(item)
            step.append(item)
        if len(step) > before:
            self._forget(step[before:], line)
        return step

    def _take(self, unwanted: Callable[[Queued], bool]) -> list[Queued]:
        taken = [item for item in self._items.values() if unwanted(item)]
        for item in taken:
            self._remove(item)
        return taken

    def _remove(self, item: Queued) -> None:
        line = self._busy[item.request.layer]
        (line.large if item.large else line.small).remove(item)
        self._clients.left(item)
        self._forget([item], line)

    def _forget(self, items: list[Queued], line: Line) -> None:
        """Note that small or large requests of a line, which left their queue and their accounts, wait no more."""
        layer = items[0].request.layer
        line.changed()
        for item in items:
            del line.waiting[item]
            del self._items[item.key]
            self.tokens -= item.request.tokens
        self.requests -= len(items)
        if not items[0].large:
            self._small_requests -= len(items)
        elif self.requests == self._small_requests:
            self._large_since = math.inf
        if layer in self._full and not line.is_full:
            self._full.discard(layer)
        if not line.waiting:
            del self._busy[layer]
        if not self.requests:
            self._deadlines.clear()
        elif len(self._deadlines) > 2 * self.requests + 64:  # most are of requests that left long before
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._items]
            heapq.heapify(self._deadlines)

    def _soonest_deadline(self) -> float:
        while self._deadlines and self._deadlines[0][1] not in self._items:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else math.inf


def _hurry_seconds(ahead: Ahead | None) -> float:
    return -math.inf if ahead is None else ahead.hurry_seconds


def _small_ready(due: float, hurry: float) -> float:
    return due if due == -math.inf else max(due, hurry)
