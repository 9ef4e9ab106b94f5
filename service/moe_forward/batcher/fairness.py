"""Fair between clients: who has been given least goes first, and nobody's queue shuts out the others.

Every client has a figure of the service it was given, in shares of a step. A client that comes from a rest begins at
the clock, which is what a client would have been given in fair parts; so rest is not saved up, and what was had beyond
the fair part is not forgotten until the others have caught up. (Weighted fair queueing, as in Demers, Keshav and
Shenker, "Analysis and Simulation of a Fair Queueing Algorithm", SIGCOMM 1989, with all weights equal.)
"""

from __future__ import annotations

import heapq
from collections import OrderedDict

from moe_forward.batcher.limits import Account, BatchLimits, Queued

RESERVE_PART = 4
"""A queue that is full keeps this part of its size for clients that have less than their share of it."""


class Clients:
    """What each client has waiting, and what it was given. limits: of the queue that they share."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._clock = 0.0
        self._waiting: dict[int, Account] = {}
        self._ahead: dict[int, float] = {}  # clients at rest that were given more than the clock says

    def may_queue(self, client: int, tokens: int, queue_requests: int, queue_tokens: int) -> bool:
        """Tell whether a request may join a queue of so many requests and tokens.

        Anybody's may until the queue is full. Then only that of a client which has nothing there, or stays below the
        queue divided by the clients that wait, into a reserve of a quarter. So what was accepted is never dropped for
        another, and a client alone may use the whole queue.
        """
        limits = self._limits
        if queue_requests < limits.max_queue_requests and queue_tokens + tokens <= limits.max_queue_tokens:
            return True
        if queue_requests + 1 > _with_reserve(limits.max_queue_requests):
            return False
        if queue_tokens + tokens > _with_reserve(limits.max_queue_tokens):
            return False
        mine = self._waiting.get(client)
        return mine is None or (
            (mine.requests + 1) * len(self._waiting) <= limits.max_queue_requests
            and (mine.tokens + tokens) * len(self._waiting) <= limits.max_queue_tokens
        )

    def drain_tokens(self, client: int) -> int:
        """Return how many tokens leave the queue, in fair parts, until all of a client's have left."""
        mine = self._waiting.get(client)
        return sum(min(other.tokens, mine.tokens) for other in self._waiting.values()) if mine is not None else 0

    def small_tokens_before(self, client: int, tokens: int) -> int:
        """Return how many tokens of small requests leave, in fair parts, until a new one of `tokens` has, too."""
        mine = self._waiting.get(client)
        wanted = tokens + (mine.small_tokens if mine is not None else 0)
        others = (account for number, account in self._waiting.items() if number != client)
        return wanted + sum(min(other.small_tokens, wanted) for other in others)

    def joined(self, item: Queued) -> None:
        """Note a request that waits from now on, in its client's account."""
        client, tokens = item.request.client, item.request.tokens
        small_tokens = 0 if item.large else tokens
        account = self._waiting.get(client)
        if account is None:
            given = max(self._clock, self._ahead.pop(client, self._clock)) if self._ahead else self._clock
            account = self._waiting[client] = Account(given, 1, tokens, small_tokens)
        else:
            account.requests += 1
            account.tokens += tokens
            account.small_tokens += small_tokens
        item.account = account

    def served(self, item: Queued) -> None:
        """Charge a request that waits no more to its client."""
        share = self._limits.share(item.request.tokens)
        item.account.given += share
        self._clock += share / len(self._waiting)
        self.left(item)

    def left(self, item: Queued) -> None:
        """Note a request that waits no more."""
        account = item.account
        if account.requests == 1:
            del self._waiting[item.request.client]
            if account.given > self._clock:
                self._remember(item.request.client, account.given)
            return
        tokens = item.request.tokens
        account.requests -= 1
        account.tokens -= tokens
        if not item.large:
            account.small_tokens -= tokens

    def _remember(self, client: int, given: float) -> None:
        self._ahead[client] = given
        if len(self._ahead) > 2 * len(self._waiting) + 64:
            self._ahead = {client: given for client, given in self._ahead.items() if given > self._clock}


def _with_reserve(limit: int) -> int:
    return limit + max(1, limit // RESERVE_PART)


class FairQueue:
    """Requests of one layer and kind, next first: of the client that was given least, in its own order of arrival."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._waiting: dict[int, OrderedDict[Queued, None]] = {}  # by client, in order of arrival
        # Empty until there are several clients. A place may say less than its client was given meanwhile, and is put
        # right when it comes to the front.
        self._places: list[tuple[float, float, int]] = []  # given, arrival of its first, client
        self._placed: set[int] = set()
        self.requests = 0
        self.tokens = 0

    @property
    def is_full(self) -> bool:
        """Whether a step could not hold more."""
        return self.tokens >= self._limits.max_step_tokens or self.requests >= self._limits.max_step_requests

    def add(self, item: Queued) -> None:
        """Queue a request that has joined its client's account."""
        client = item.request.client
        mine = self._waiting.get(client)
        if mine is None:
            mine = self._waiting[client] = OrderedDict()
            if self._places and client not in self._placed:
                self._placed.add(client)
                heapq.heappush(self._places, (item.account.given, item.arrived_seconds, client))
        mine[item] = None
        self.requests += 1
        self.tokens += item.request.tokens

    def remove(self, item: Queued) -> None:
        """Take a request out, wherever it stands."""
        client = item.request.client
        mine = self._waiting[client]
        del mine[item]
        self.requests -= 1
        self.tokens -= item.request.tokens
        if not mine:
            del self._waiting[client]
            if self._places and not self._waiting:
                self._places.clear()
                self._placed.clear()

    def place(self) -> tuple[float, float]:
        """Return how far in front the queue's first is, smallest first; there must be one."""
        item = self.first()
        return item.account.given, item.arrived_seconds

    def first(self) -> Queued:
        """Return whose turn it is; there must be one."""
        if len(self._waiting) == 1:
            (mine,) = self._waiting.values()
            return next(iter(mine))
        return self._first_of_several()

    def _first_of_several(self) -> Queued:
        if not self._places:
            self._place_all()
        places = self._places
        while True:
            place = places[0]
            client = place[2]
            mine = self._waiting.get(client)
            if mine is None:
                heapq.heappop(places)
                self._placed.discard(client)
                continue
            item = next(iter(mine))
            now = (item.account.given, item.arrived_seconds, client)
            if now == place:
                return item
            heapq.heapreplace(places, now)
            if places[0] is now:
                return item

    def _place_all(self) -> None:
        firsts = [next(iter(mine)) for mine in self._waiting.values()]
        self._places = [(item.account.given, item.arrived_seconds, item.request.client) for item in firsts]
        heapq.heapify(self._places)
        self._placed.update(self._waiting)
