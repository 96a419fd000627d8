"""Loads the CPU library that CMake built, by its path, and compares its ReLU with PyTorch's."""

import sys

import torch

torch.ops.load_library(sys.argv[1])

generator = torch.Generator().manual_seed(0)
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    # The last size is beyond the grain of one thread.
    for size in (0, 1, 33, 100_003):
        x = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        out = torch.ops.pyext.relu_forward(x)
        torch.testing.assert_close(out, torch.relu(x), rtol=0, atol=0)
        grad = torch.ops.pyext.relu_backward(torch.ones_like(x), out)
        torch.testing.assert_close(grad, (x > 0).to(dtype), rtol=0, atol=0)
