"""The hard limits that every kernel states beside itself.

``python -m pyext.lab compile-report`` reads the machine code of each architecture, and
``tests/test_compile_report.py`` holds it to them. A limit is loosened only with a reason in the
same place.
"""

from typing import NamedTuple

REGISTERS_PER_MULTIPROCESSOR = 65536
MOST_REGISTERS = 255  # of one thread

# By Little's law: 8 TB/s over 148 multiprocessors (sm_100) times 1 us of latency; sm_80 and sm_90
# need less.
BYTES_IN_FLIGHT = 54_000


class Limits(NamedTuple):
    registers: int  # per thread, at most
    load_bytes: int  # the widest global load of a thread, at least
    store_bytes: int  # the widest global store, at least
    shared_bytes: int = 0  # per program, at most
    spill_bytes: int = 0  # local memory per thread, at most


LIMITS = {}
"""Kernel's name -> what gives its limits from the arguments that it was specialised for."""


def limits(of):
    """Decorate a kernel: ``of(specialised)``, a :class:`Limits`, are its limits.

    ``specialised`` (of ``pyext.lab.compile_report.triton_rows``) knows the ``threads`` of a
    program, the ``itemsize`` of a pointer's elements, whether arguments are ``aligned`` to 16 bytes
    or divisible by 16, and the ``constants``.
    """

    def state(kernel):
        LIMITS[kernel.fn.__name__] = of
        return kernel

    return state


def registers_for(programs, threads):
    """The most registers with which so many programs fit on a multiprocessor; they come in eights.

    The report's table of architectures has 65536 registers for each.
    """
    each = REGISTERS_PER_MULTIPROCESSOR // (programs * threads)
    return min(each // 8 * 8, MOST_REGISTERS)
