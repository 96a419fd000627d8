"""How a raw op enters the dispatcher namespace ``pyext_triton``, compiled or interpreted.

Compiled, a raw op is a ``triton_op``: ``torch.compile`` looks into it and sees the kernels. In
Triton's interpreter, which runs a kernel in NumPy (TRITON_INTERPRET=1, read when Triton is first
imported), a ``triton_op`` fails ``opcheck`` and ``fullgraph``; there it is an opaque ``custom_op``.
"""

import functools
import re
import struct
import threading
from unittest import mock

import torch
import triton

NAMESPACE = "pyext_triton"
INTERPRETED = triton.knobs.runtime.interpret

if INTERPRETED:
    # The interpreter keeps its state (the program's index, the patched language) in globals.
    _one_thread = threading.RLock()

    def loop_bound(value):
        """A kernel's runtime number of steps, for ``range``: a Python int. Triton 3.6's interpreter
        itself fails under NumPy >= 2.4 ("only 0-dimensional arrays can be converted")."""
        return value.handle.data.item()
else:

    @triton.jit
    def loop_bound(value):
        return value


def wrap_triton(kernel):
    """``torch.library.wrap_triton``, which PyTorch 2.11 refuses for an interpreted kernel."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def float_bits(value):
    """A Python float for a kernel, which would get it rounded to float32: the bits of a float64, as
    an integer. ``_elementwise.float_from_bits`` is the other end."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def raw_op(schema):
    """Decorate a launcher: register it as ``pyext_triton::<its name>`` with this schema.

    ``schema`` is everything after the name, ``"(Tensor x) -> Tensor"``, and is textually the one of
    the compiled namespace. The launcher runs under a guard for its first argument's device: Triton
    launches on the *current* device's current stream.
    """

    def register(launcher):
        @functools.wraps(launcher)
        def guarded(first, *rest, **options):
            with torch.cuda.device_of(first):
                return launcher(first, *rest, **options)

        @functools.wraps(launcher)
        def interpreted(*arguments, **options):
            with _one_thread:
                return guarded(*arguments, **options)

        define = torch.library.custom_op if INTERPRETED else torch.library.triton_op
        # PyTorch 2.11's triton_op has the argument schema and ignores it: it infers one instead,
        # which would have other names for the mutated arguments.
        with mock.patch.object(
            torch._library.triton, "infer_schema", lambda *_, **__: schema, create=True
        ):
            return define(
                f"{NAMESPACE}::{launcher.__name__}",
                interpreted if INTERPRETED else guarded,
                mutates_args=re.findall(r"Tensor\(\w+!\) (\w+)", schema),
                schema=schema,
            )

    return register


def expect(name, tensor, shape, like):
    """Refuse a tensor that a kernel would read out of bounds or misread.

    For memory safety. Of some public functions it is the first check, and they say in better words
    what it has refused. Raises RuntimeError.
    """
    torch._check(
        tuple(tensor.shape) == tuple(shape)
        and tensor.dtype == like.dtype
        and tensor.device == like.device,
        lambda: (
            f"{name}: expected shape {tuple(shape)}, {like.dtype} on {like.device}, "
            f"got {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
        ),
    )


def expect_floating(name, tensor):
    """Refuse a dtype that the kernels have no accumulator for. Raises RuntimeError."""
    torch._check(
        tensor.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16),
        lambda: f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}",
    )
