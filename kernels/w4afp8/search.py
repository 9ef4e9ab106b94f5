"""Int4 scales searched for the least error: of the weights, or of what they make of calibration activations.

A scale below amax / 7 cuts the largest values off and rounds all others more finely. Everything here is elementwise, or
exact in any order, so that the bits are the same on every device: sums are added by halves, not by a library's choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from w4afp8.tensors import Int4Weight
from w4afp8.weights import full_scales, round_groups, split_groups

SEARCH_FACTORS = (1.0, 0.93, 0.875, 0.84, 0.8, 0.76, 0.72)
"""Scales that a search tries, in units of amax / 7; at 0.875 = 7/8 the code -8 reaches a largest value below zero.

Of normal weights in groups of 128 these bring the relative error from 0.1173 to 0.1013; steps of 0.005 from 0.5 on
would reach 0.1009, at 14 times the work.
"""

SEARCH_ELEMENTS = 1 << 20
"""Elements searched at a time on a CPU, in whole rows: bounds the float32 temporaries to four of 4 MiB."""


class GroupErrors(NamedTuple):
    """Sums of squares over each group of inputs, [N, K/group] float64.

    total: of what is approximated. rtn: of its errors with scale amax / 7. search: with the scale of least weight
    error. calibrated: with the scale of least output error; None without importance.
    """

    total: torch.Tensor
    rtn: torch.Tensor
    search: torch.Tensor
    calibrated: torch.Tensor | None = None


class SearchedWeight(NamedTuple):
    """An int4 weight whose scales were searched, and what that gained.

    weight: codes [N, K/2], scales [N, K/group].
    weight_errors: of the weights. output_errors: of outputs, each square times its channel's importance; None without.
    """

    weight: Int4Weight
    weight_errors: GroupErrors
    output_errors: GroupErrors | None


def search_int4(weight: torch.Tensor, group_size: int = 128, importance: torch.Tensor | None = None) -> SearchedWeight:
    """Quantize a weight to int4 with the scale of least error, of `SEARCH_FACTORS` times amax / 7.

    No group's error is larger than that of `quantize_int4`; of equal errors the larger scale wins. Bits depend on the
    group alone, and are the same on every device.

    weight: [N, K] floating point.
    group_size: inputs that share one scale; divides K and is even.
    importance: [K] float32 on the weight's device, finite and not negative, the mean square E[x_k^2] of each input
        channel. The error is then that of outputs, sum of E[x_k^2] (w_k - q_k s)^2, where channels are taken as
        uncorrelated. Without, or in a group whose channels all have 0, every weight counts the same.
    Returns: the weight, and each group's squared errors.
    Raises: ValueError for a bad shape, dtype or group size, and for NaN or Inf.
    Source: AWQ, arXiv 2306.00978, clips weights where the error of outputs is least; the diagonal of the second moment
        is GPTQ's, arXiv 2210.17323, without its correlations.
    """
    groups = split_groups(weight, group_size)
    channels = None if importance is None else _channels(importance, groups)
    height = len(groups) if groups.is_cuda else max(1, SEARCH_ELEMENTS // weight.shape[1])
    found = [_search(block, channels) for block in torch.split(groups, height)]
    scales, of_weights, of_outputs = zip(*found, strict=True)
    return SearchedWeight(
        round_groups(groups, torch.cat(scales)), _joined(of_weights), None if channels is None else _joined(of_outputs)
    )


class _Channels(NamedTuple):
    """Importance by group. relative: [group, 1, G] float32 up to 1. unit: [G] float64, what 1 stands for."""

    relative: torch.Tensor
    unit: torch.Tensor


class _Choice(NamedTuple):
    """Scales [N, G] and the errors they leave, of weights and with channels of outputs too: [N, G] float32 each.

    The errors are in units of the group's amax / 7 and importance, so that no square over- or underflows.
    """

    scales: torch.Tensor
    errors: tuple[torch.Tensor, ...]


def _channels(importance: torch.Tensor, groups: torch.Tensor) -> _Channels:
    """Check an importance [K] and bring it to groups; one without any becomes one of ones, of unit 0."""
    columns = groups.shape[1] * groups.shape[2]
    if importance.dtype != torch.float32 or tuple(importance.shape) != (columns,):
        raise ValueError(f"importance: expected float32 [{columns}], got {importance.dtype} {list(importance.shape)}")
    if not bool(((importance >= 0) & importance.isfinite()).all()):
        raise ValueError("importance: expected finite values that are not negative")
    split = importance.view(groups.shape[1], groups.shape[2])
    unit = split.amax(dim=1)
    relative = (split / unit.unsqueeze(1)).masked_fill_(unit.unsqueeze(1) == 0, 1)
    return _Channels(relative.t().contiguous().unsqueeze(1), unit.double())


def _search(groups: torch.Tensor, channels: _Channels | None) -> tuple[torch.Tensor, GroupErrors, GroupErrors | None]:
    """Find the scales of groups [N, G, group], and the errors of weights and outputs."""
    inputs_first = groups.reshape(-1, groups.shape[2]).t().contiguous()  # long rows to add, however small a group is
    steps, scratch = torch.empty_like(inputs_first), torch.empty_like(inputs_first)
    largest = full_scales(groups)

    def sums(squares: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weighted = () if channels is None else (_sum(_weighted(squares, channels, out=scratch)).view_as(largest),)
        return (_sum(squares).view_as(largest), *weighted)

    def attempt(factor: float) -> _Choice:
        scales = largest * factor
        torch.div(inputs_first, scales.view(-1), out=steps)
        torch.round(steps, out=scratch)
        squares = steps.sub_(scratch.clamp_(-8, 7)).square_()
        unit = (scales / largest).square_()
        # A scale of 0 leaves NaN, and no error that could be the least.
        return _Choice(scales, tuple((found * unit).nan_to_num_(nan=torch.inf) for found in sums(squares)))

    first = attempt(SEARCH_FACTORS[0])
    choices = [first, *(first for _ in first.errors)]  # amax / 7, and what is least in each kind of error
    for factor in SEARCH_FACTORS[1:]:
        tried = attempt(factor)
        for kind in range(len(tried.errors)):
            choices[1 + kind] = _better(choices[1 + kind], tried, kind)
    totals = sums(torch.div(inputs_first, largest.view(-1), out=steps).square_())
    unit = largest.double().square_()
    units = (unit,) if channels is None else (unit, unit * channels.unit)
    told = [
        GroupErrors(
            *(
                (error.double() * unit).masked_fill_(largest == 0, 0)
                for error in (totals[kind], *(choice.errors[kind] for choice in choices))
            )
        )
        for kind, unit in enumerate(units)
    ]
    return choices[-1].scales, told[0], told[1] if channels is not None else None


def _better(one: _Choice, other: _Choice, kind: int) -> _Choice:
    """Take `other` in the groups where its error of a kind is less, `one` in all others."""
    less = other.errors[kind] < one.errors[kind]
    errors = (torch.where(less, theirs, ours) for ours, theirs in zip(one.errors, other.errors, strict=True))
    return _Choice(torch.where(less, other.scales, one.scales), tuple(errors))


def _weighted(squares: torch.Tensor, channels: _Channels, out: torch.Tensor) -> torch.Tensor:
    """Multiply squares [group, N * G] by their channels' importance."""
    size, _, per_row = channels.relative.shape
    torch.mul(squares.view(size, -1, per_row), channels.relative, out=out.view(size, -1, per_row))
    return out


def _sum(rows: torch.Tensor) -> torch.Tensor:
    """Add rows [size, M] by halves, in place: an order that depends on nothing but `size`."""
    while (size := len(rows)) > 1:
        half = size // 2
        rows[:half].add_(rows[size - half :])
        rows = rows[: size - half]
    return rows[0]


def _joined(blocks: tuple[GroupErrors, ...]) -> GroupErrors:
    total, rtn, search = zip(*(block[:3] for block in blocks), strict=True)
    calibrated = [block.calibrated for block in blocks if block.calibrated is not None]
    return GroupErrors(
        torch.cat(total), torch.cat(rtn), torch.cat(search), torch.cat(calibrated) if calibrated else None
    )
