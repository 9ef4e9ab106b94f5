"""What one request holds of the slab, and its giving back once nobody can touch it any more."""

from __future__ import annotations

from moe_forward.api.ports import Link
from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.slab import Extent


class Lease:
    """The extents of one request: its body, its converted tensors, its output.

    link: whose slab they lie in, and who knows when the ranks are done with them.
    """

    __slots__ = ("_extents", "_link", "_request")

    def __init__(self, link: Link) -> None:
        self._link = link
        self._extents: list[Extent] = []
        self._request: int | None = None

    def take(self, nbytes: int, what: str) -> Extent:
        """Allocate `nbytes` bytes for `what` ("the body").

        Raises: ForwardError TOO_LARGE when the request as a whole can never fit, QUEUE_FULL when it does not fit now.
        """
        slab = self._link.slab
        extent = slab.allocate(nbytes)
        if extent is None:
            held = sum(extent.nbytes for extent in self._extents)
            if held + nbytes > slab.nbytes:
                raise ForwardError(
                    ErrorCode.TOO_LARGE,
                    f"{what} takes {nbytes} bytes beside the {held} this request already holds; "
                    f"expected at most {slab.nbytes} together (slab_bytes)",
                )
            raise ForwardError(
                ErrorCode.QUEUE_FULL, f"no room for {what} of {nbytes} bytes now: other requests fill the memory"
            )
        self._extents.append(extent)
        return extent

    def handed_over(self, request: int) -> None:
        """Note that the engine gets `request`: from now on only the link knows when its bytes are free."""
        self._request = request

    def release(self) -> None:
        """Give everything back, as soon as no rank can touch it; a second call does nothing."""
        if not self._extents:
            return
        if self._request is None:
            self._free()
        else:
            self._link.release_when_done(self._request, self._free)

    def _free(self) -> None:
        slab = self._link.slab
        while self._extents:
            slab.free(self._extents.pop())
