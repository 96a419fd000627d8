"""Prints, as CMake's set() commands, what the build found, so that CMake's build is the same."""

from __future__ import annotations

import os
import sys

import toolchain


def architectures(names: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST's "9.0 10.0+PTX" in CMake's words: 90-real, 100."""
    words = names.replace(";", " ").split()
    return [
        word.removesuffix("+PTX").replace(".", "") + ("" if word.endswith("+PTX") else "-real")
        for word in words
    ]


def settings() -> dict[str, list[str]]:
    """Names and values of CMake variables. Raises BuildError like the other build."""
    paths = toolchain.search_paths()
    torch = toolchain.find_torch(paths)
    if torch is None or not torch.is_supported:
        raise toolchain.BuildError(
            f"building needs PyTorch {toolchain.OLDEST_TORCH} or newer in {sys.executable}'s "
            "environment; activate the one that has it."
        )
    found = {
        "PYEXT_TORCH_VERSION": [torch.version],
        "PYEXT_TORCH_INCLUDE": [
            f"{torch.folder}/include",
            f"{torch.folder}/include/torch/csrc/api/include",
        ],
        "PYEXT_TORCH_LIBRARIES": [f"{torch.folder}/lib"],
        "PYEXT_CXX_FLAGS": [*toolchain.CXX_FLAGS],
        "PYEXT_EMULATOR_FLAGS": [*toolchain.EMULATOR_FLAGS],
    }
    toolkit = toolchain.plan_cuda(torch, paths)
    if isinstance(toolkit, str):
        return found | {"PYEXT_CUDA_LEFT_OUT": [toolkit]}
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    return found | {
        "PYEXT_CUDA_MAJOR": [toolkit.version.partition(".")[0]],
        "PYEXT_NVCC": [f"{toolkit.home}/bin/nvcc"],
        "PYEXT_CUDA_RUNTIME": [f"{toolkit.runtime}"],
        "PYEXT_CUDA_ARCHITECTURES": architectures(chosen) if chosen else ["OFF"],
        "PYEXT_NVCC_FLAGS": toolchain.nvcc_flags(toolkit.version),
    }


def main() -> int:
    try:
        found = settings()
    except toolchain.BuildError as error:
        print(f"pyext: {error}", file=sys.stderr)
        return 3
    for name, values in found.items():
        print(f"set({name} [==[{';'.join(values)}]==])")
    return 0


if __name__ == "__main__":
    sys.exit(main())
