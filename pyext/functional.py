"""The ops as functions, mirroring ``torch.nn.functional``: ``relu``, ``mse_loss``, ``two_layer``, …

Every function takes the keyword ``backend``: ``None`` (the default of ``pyext.use_backend``, else
the best backend for the tensor's device), ``"eager"``, ``"extension"`` or ``"triton"``.

A result of ``extension`` on the CPU of 2 MiB or more lies in a pool's memory: it cannot grow in
place (``resize_``, ``out=``). ``pyext.empty_buffer_pool()`` frees what nobody uses.
"""

from pyext.registry import ops as _ops

__all__ = list(_ops())

globals().update({name: op.function for name, op in _ops().items()})


def __dir__() -> list[str]:
    return __all__
