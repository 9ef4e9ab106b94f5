"""The sm_90a kernel library: where it lies, whether it fits this package, and its C interface (csrc/w4afp8.h)."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

ABI_VERSION = 3
BF16, F16, F32 = 0, 1, 2
PLAIN, SWIGLU = 0, 1
INT4, FP8 = 0, 1
AS_IS, HALVES, INTERLEAVED = 0, 1, 2
SIGMOID, SOFTMAX = 0, 1

_DEFAULT = Path(__file__).parent / "lib" / "libw4afp8.so"
_COMMAND = "python -m w4afp8.build"


class LibraryNotBuilt(RuntimeError):
    """The kernel library is not there."""


class LibraryMismatch(RuntimeError):
    """The kernel library is there but was made for another version of this package, or cannot be loaded."""


class KernelError(RuntimeError):
    """A function of the library refused or failed to launch.

    code: of w4afp8.h where 1000 or more, else a cudaError_t.
    """

    def __init__(self, function: str, code: int, message: str) -> None:
        super().__init__(f"{function}: {message} (code {code})")
        self.code = code


class GroupedGemmArguments(ctypes.Structure):
    """W4AFP8GroupedGemm of w4afp8.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_scales", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("channel_scales", ctypes.c_void_p),
        ("row_weights", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("max_rows", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("expected_rows", ctypes.c_int64),
        ("weight_type", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("full_range", ctypes.c_int32),
        ("token_group", ctypes.c_int32),
        ("epilogue", ctypes.c_int32),
        ("y_type", ctypes.c_int32),
        ("early_start", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
    )


class QuantizeArguments(ctypes.Structure):
    """W4AFP8Quantize of w4afp8.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("num_rows", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("non_finite", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("x_type", ctypes.c_int32),
        ("token_group", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
        ("activation", ctypes.c_int32),
        ("nan_scales", ctypes.c_int32),
    )


class SliceArguments(ctypes.Structure):
    """W4AFP8Slice of w4afp8.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("slices", ctypes.c_void_p),
        ("units", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("x_type", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
    )


class GateArguments(ctypes.Structure):
    """W4AFP8Gate of w4afp8.h."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("products", ctypes.c_void_p),
        ("row_units", ctypes.c_void_p),
        ("expert_units", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("non_finite", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("logits_type", ctypes.c_int32),
        ("parts", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("scores", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("top_groups", ctypes.c_int32),
        ("normalize", ctypes.c_int32),
        ("sum_floor", ctypes.c_float),
        ("scaling_factor", ctypes.c_float),
        ("device", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
    )


class RoutesArguments(ctypes.Structure):
    """W4AFP8Routes of w4afp8.h."""

    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("out_ids", ctypes.c_void_p),
        ("out_weights", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("padded_rows", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("wide", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
    )


_STRUCTS = {0: GroupedGemmArguments, 1: QuantizeArguments, 2: SliceArguments, 3: GateArguments, 4: RoutesArguments}


class Library:
    """An open kernel library; its functions launch on the stream they are given, and do not wait."""

    def __init__(self, path: Path) -> None:
        """Open and check the library at `path`.

        Raises: LibraryNotBuilt where there is none, LibraryMismatch where it does not fit.
        """
        if not path.is_file():
            raise LibraryNotBuilt(f"kernel library: expected {path}, which is not there; build it with `{_COMMAND}`")
        self.path = path
        try:
            functions = ctypes.CDLL(str(path))
            self._version = functions.w4afp8_abi_version
            self._struct_bytes = functions.w4afp8_struct_bytes
            self._error_string = functions.w4afp8_error_string
            self._grouped_gemm = functions.w4afp8_grouped_gemm
            self._quantize = functions.w4afp8_quantize
            self._slice = functions.w4afp8_slice
            self._gate = functions.w4afp8_gate
            self._copy = functions.w4afp8_copy
            self._routes = functions.w4afp8_routes
        except (OSError, AttributeError) as error:
            raise LibraryMismatch(f"kernel library {path}: {error}; build it again with `{_COMMAND}`") from error
        self._version.restype, self._version.argtypes = ctypes.c_int32, ()
        self._struct_bytes.restype, self._struct_bytes.argtypes = ctypes.c_int64, (ctypes.c_int32,)
        self._error_string.restype, self._error_string.argtypes = ctypes.c_char_p, (ctypes.c_int,)
        self._grouped_gemm.restype = ctypes.c_int
        self._grouped_gemm.argtypes = (ctypes.POINTER(GroupedGemmArguments),)
        self._quantize.restype = ctypes.c_int
        self._quantize.argtypes = (ctypes.POINTER(QuantizeArguments),)
        self._slice.restype, self._slice.argtypes = ctypes.c_int, (ctypes.POINTER(SliceArguments),)
        self._gate.restype, self._gate.argtypes = ctypes.c_int, (ctypes.POINTER(GateArguments),)
        self._copy.restype = ctypes.c_int
        self._copy.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p)
        self._routes.restype = ctypes.c_int
        self._routes.argtypes = (ctypes.POINTER(RoutesArguments),)
        self._check("interface version", self._version(), ABI_VERSION)
        for which, struct in _STRUCTS.items():
            self._check(f"bytes of {struct.__name__}", self._struct_bytes(which), ctypes.sizeof(struct))

    def grouped_gemm(self, arguments: GroupedGemmArguments) -> None:
        """Launch a grouped GEMM. Raises: KernelError."""
        self._report("w4afp8_grouped_gemm", self._grouped_gemm(ctypes.byref(arguments)))

    def quantize(self, arguments: QuantizeArguments) -> None:
        """Launch a quantization. Raises: KernelError."""
        self._report("w4afp8_quantize", self._quantize(ctypes.byref(arguments)))

    def slice_rows(self, arguments: SliceArguments) -> None:
        """Launch the cutting of rows. Raises: KernelError."""
        self._report("w4afp8_slice", self._slice(ctypes.byref(arguments)))

    def gate(self, arguments: GateArguments) -> None:
        """Launch the choice of experts. Raises: KernelError."""
        self._report("w4afp8_gate", self._gate(ctypes.byref(arguments)))

    def copy(self, copies_address: int, count: int, device: int, stream: int) -> None:
        """Start copies. copies_address: of `count` W4AFP8Copy, read before this returns. Raises: KernelError."""
        self._report("w4afp8_copy", self._copy(copies_address, count, device, stream))

    def routes(self, arguments: RoutesArguments) -> None:
        """Launch the padding of routes. Raises: KernelError."""
        self._report("w4afp8_routes", self._routes(ctypes.byref(arguments)))

    def error_string(self, code: int) -> str:
        """Say what an error code means."""
        text: bytes = self._error_string(code)
        return text.decode()

    def _report(self, function: str, code: int) -> None:
        if code:
            raise KernelError(function, code, self.error_string(code))

    def _check(self, what: str, found: int, expected: int) -> None:
        if found != expected:
            raise LibraryMismatch(
                f"kernel library {self.path}: expected {what} {expected}, got {found}; build it again with `{_COMMAND}`"
            )


def load() -> Library:
    """Open the library that W4AFP8_LIBRARY names, else lib/libw4afp8.so of this package; later calls return the same.

    Raises: LibraryNotBuilt where there is none, LibraryMismatch where it does not fit.
    """
    return _open(os.environ.get("W4AFP8_LIBRARY") or str(_DEFAULT))


@functools.cache
def _open(path: str) -> Library:
    return Library(Path(path))
