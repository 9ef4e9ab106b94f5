"""A layer's router and its gate as two kernels for sm_90a around one product: three launches for any number of tokens.

The bits are those of `w4afp8.linear` and of the gates in torch, which are the specification. The product stays a
BLAS's, since every partial sum of it is exact (`w4afp8.linear` says why). That also allows to cut its depth: a product
of few tokens has few tiles, far fewer than a GPU has multiprocessors, so it is made as several products of a part of
the depth each, and the gate's kernel adds the parts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from w4afp8.library import BF16, F16, F32, SIGMOID, SOFTMAX, GateArguments, SliceArguments, load
from w4afp8.linear import SlicedWeight, slice_bits
from w4afp8.pointers import address, aligned_address, check_tensor, cuda_device, stream_address

Scores = Literal["sigmoid", "softmax"]

MAX_EXPERTS = 1024
"""Of a layer, for the kernel: a CTA's shared memory has their slice products."""
MAX_TOP_K = 32
MAX_GROUPS = 32

_TYPES = {torch.bfloat16: BF16, torch.float16: F16, torch.float32: F32}
_SCORES = {"sigmoid": SIGMOID, "softmax": SOFTMAX}
# Up to so many tokens, the product is cut into so many parts.
_PARTS = ((64, 16), (128, 8), (256, 4))
# Elements of tokens, or of their products, in float64 at a time: 256 MiB of slices.
_ELEMENTS = 1 << 24


class GateRule(NamedTuple):
    """How experts are chosen by logits, and weighed.

    scores: `sigmoid`, or `softmax`, which has neither a bias nor groups. top_k: experts a token gets.
    num_groups, top_groups: experts are chosen inside the `top_groups` of `num_groups` whose two best have the largest
        sums; 1 group for none.
    normalize: divide weights by their sum plus sum_floor. scaling_factor: multiplies weights.
    """

    scores: Scores
    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    normalize: bool = True
    sum_floor: float = 0.0
    scaling_factor: float = 1.0


class Chosen(NamedTuple):
    """Experts of tokens.

    ids: [T, K] int64, best first, equals by ascending id. weights: [T, K] float32.
    non_finite: [T] bool, tokens whose logits are not finite; their ids are valid ids, their weights mean nothing.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    non_finite: torch.Tensor


def fits(rule: GateRule, experts: int) -> bool:
    """Say whether the kernel is large enough for a gate; what is not has to be computed in torch.

    rule: of the gate. experts: of the layer.
    Returns: True within MAX_EXPERTS, MAX_TOP_K and MAX_GROUPS.
    """
    return experts <= MAX_EXPERTS and rule.top_k <= MAX_TOP_K and rule.num_groups <= MAX_GROUPS


def slice_rows_cuda(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut rows into integer slices on the GPU with the bits of `linear`; does not wait.

    x: [T, H] bfloat16, float16 or float32, contiguous CUDA, H even. bits: of a slice, 1 to 26.
    Returns: slices [2, T, H] float64, the high ones first, and each row's power of two [T] float64. A row with NaN or
        Inf has NaN in its slices, so that its products are NaN.
    Raises: ValueError naming the argument; LibraryNotBuilt, LibraryMismatch, KernelError.
    Source: as `w4afp8.linear`.
    """
    _check_rows(x)
    if not 1 <= bits <= 26:
        raise ValueError(f"bits: expected 1 to 26, got {bits}")
    return _slice(x, bits, cuda_device("x", x))


def choose_experts_cuda(logits: torch.Tensor, bias: torch.Tensor | None, rule: GateRule) -> Chosen:
    """Choose experts by router logits on the GPU, with the bits of the gates in torch; does not wait.

    logits: [T, E] bfloat16, float16 or float32, contiguous CUDA.
    bias: [E] float32, added to scores for choosing only, or None.
    rule: within the limits of `fits`.
    Returns: ids, weights and flags.
    Raises: ValueError naming the argument; LibraryNotBuilt, LibraryMismatch, KernelError.
    Source: DeepSeek-V3 report, arXiv 2412.19437 section 2.1.2; Shazeer et al., arXiv 1701.06538 section 2.1.
    """
    if logits.ndim != 2 or logits.dtype not in _TYPES:
        raise ValueError(f"logits: expected a float type and [T, E], got {logits.dtype} {list(logits.shape)}")
    rows, experts = logits.shape
    _check_rule(rule, experts, bias)
    device = cuda_device("logits", logits)
    chosen = _room(rows, rule.top_k, device)
    arguments = _gate_arguments(rule, bias, experts, chosen, device)
    arguments.logits = address("logits", logits, device)
    arguments.logits_type = _TYPES[logits.dtype]
    load().gate(arguments)
    return chosen


def route_cuda(
    x: torch.Tensor, weight: SlicedWeight, bias: torch.Tensor | None, rule: GateRule, out: Chosen | None = None
) -> Chosen:
    """Choose experts by hidden states and a layer's router on the GPU; does not wait.

    x: [T, H] bfloat16, float16 or float32, contiguous CUDA, H even.
    weight: of E experts, what `slice_weight` made of [E, H].
    bias, rule: as in `choose_experts_cuda`. out: to write into; None: new tensors.
    Returns: ids, weights and flags with the bits that `linear` and the gates in torch give for x as float32; those of
        a token depend on nothing beside it.
    Raises: ValueError naming the argument; LibraryNotBuilt, LibraryMismatch, KernelError.
    Source: as `w4afp8.linear` and `choose_experts_cuda`.
    """
    _check_rows(x)
    rows, inputs = x.shape
    experts = weight.units.shape[0]
    check_tensor("weight slices", weight.slices, torch.float64, (2 * experts, inputs))
    check_tensor("weight units", weight.units, torch.float64, (experts, 1))
    _check_rule(rule, experts, bias)
    device = cuda_device("x", x)
    units = address("weight units", weight.units, device)
    address("weight slices", weight.slices, device)
    bits = slice_bits(inputs)
    chosen = _room(rows, rule.top_k, device) if out is None else _checked(out, rows, rule.top_k, device)
    step = max(8, _ELEMENTS // max(inputs, 2 * experts) // 8 * 8)  # of 8 tokens, so that each begins aligned
    for first in range(0, rows, step):
        part = Chosen(*(tensor[first : first + step] for tensor in chosen)) if rows > step else chosen
        slices, row_units = _slice(x[first : first + step], bits, device)
        products = slice_products(slices, weight.slices)
        arguments = _gate_arguments(rule, bias, experts, part, device)
        arguments.products = products.data_ptr()
        arguments.row_units = row_units.data_ptr()
        arguments.expert_units = units
        arguments.parts = products.shape[0]
        arguments.bits = bits
        load().gate(arguments)
    return chosen


def slice_products(slices: torch.Tensor, weight_slices: torch.Tensor, parts: int | None = None) -> torch.Tensor:
    """Multiply slices of rows by slices of a weight, in parts of the depth that are still to be added.

    slices: [2, T, H] float64. weight_slices: [2E, H] float64. parts: how many, a divisor of H; None: by the size.
    Returns: [S, 2T, 2E] float64.
    """
    _, rows, inputs = slices.shape
    count = _parts(rows, inputs) if parts is None else parts
    # Views, whose rows are H apart: the BLAS takes them without a copy.
    left = slices.view(2 * rows, count, inputs // count).transpose(0, 1)
    right = weight_slices.view(-1, count, inputs // count).permute(1, 2, 0)
    return torch.bmm(left, right)


def _parts(rows: int, inputs: int) -> int:
    wanted = next((parts for most, parts in _PARTS if rows <= most), 1)
    return next(parts for parts in range(wanted, 0, -1) if inputs % parts == 0)


def _check_rows(x: torch.Tensor) -> None:
    if x.ndim != 2 or x.shape[1] == 0 or x.shape[1] % 2:
        raise ValueError(f"x: expected a shape [T, H] with H positive and even, got {list(x.shape)}")
    if x.dtype not in _TYPES:
        raise ValueError(f"x: expected bfloat16, float16 or float32, got {x.dtype}")


def _check_rule(rule: GateRule, experts: int, bias: torch.Tensor | None) -> None:
    if rule.scores not in _SCORES:
        raise ValueError(f"scores: expected sigmoid or softmax, got {rule.scores!r}")
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"experts: expected 1 to {MAX_EXPERTS}, got {experts}")
    if not 1 <= rule.top_k <= min(experts, MAX_TOP_K):
        raise ValueError(f"top_k: expected 1 to {min(experts, MAX_TOP_K)} of {experts} experts, got {rule.top_k}")
    if rule.scores == "softmax" and bias is not None:
        raise ValueError("bias: expected None, softmax scores have no correction bias, got a tensor")
    if bias is not None:
        check_tensor("bias", bias, torch.float32, (experts,))
    groups = rule.num_groups
    if rule.scores == "softmax" and groups != 1:
        raise ValueError(f"num_groups: expected 1, softmax scores have no groups, got {groups}")
    if not 1 <= groups <= MAX_GROUPS:
        raise ValueError(f"num_groups: expected 1 to {MAX_GROUPS}, got {groups}")
    if groups == 1:
        return
    size = experts // groups
    if experts % groups or size < 2:
        raise ValueError(f"num_groups: expected groups of equal size, 2 or more of {experts}, got {groups}")
    if not 1 <= rule.top_groups <= groups or rule.top_groups * size < rule.top_k:
        raise ValueError(
            f"top_groups: expected at most {groups} groups with at least {rule.top_k} experts together, "
            f"got {rule.top_groups} groups of {size}"
        )


def _room(rows: int, top_k: int, device: torch.device) -> Chosen:
    return Chosen(
        torch.empty(rows, top_k, dtype=torch.int64, device=device),
        torch.empty(rows, top_k, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.bool, device=device),
    )


def _checked(out: Chosen, rows: int, top_k: int, device: torch.device) -> Chosen:
    expected = ((torch.int64, (rows, top_k)), (torch.float32, (rows, top_k)), (torch.bool, (rows,)))
    for name, tensor, (dtype, shape) in zip(Chosen._fields, out, expected, strict=True):
        check_tensor(f"out {name}", tensor, dtype, shape)
        address(f"out {name}", tensor, device)
    return out


def _slice(x: torch.Tensor, bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    rows, inputs = x.shape
    slices = torch.empty(2, rows, inputs, dtype=torch.float64, device=device)
    units = torch.empty(rows, dtype=torch.float64, device=device)
    load().slice_rows(
        SliceArguments(
            x=aligned_address("x", x, device),
            slices=slices.data_ptr(),
            units=units.data_ptr(),
            rows=rows,
            k=inputs,
            x_type=_TYPES[x.dtype],
            bits=bits,
            device=device.index,
            stream=stream_address(device),
        )
    )
    return slices, units


def _gate_arguments(
    rule: GateRule, bias: torch.Tensor | None, experts: int, chosen: Chosen, device: torch.device
) -> GateArguments:
    """Say all that does not depend on where the logits come from."""
    return GateArguments(
        bias=address("bias", bias, device),
        ids=chosen.ids.data_ptr(),
        weights=chosen.weights.data_ptr(),
        non_finite=chosen.non_finite.data_ptr(),
        rows=chosen.ids.shape[0],
        experts=experts,
        scores=_SCORES[rule.scores],
        top_k=rule.top_k,
        groups=rule.num_groups,
        top_groups=rule.top_groups,
        normalize=int(rule.normalize),
        sum_floor=rule.sum_floor,
        scaling_factor=rule.scaling_factor,
        device=device.index,
        stream=stream_address(device),
    )
