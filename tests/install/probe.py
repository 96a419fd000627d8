"""Prints as one line of JSON what an installation is; run.py runs it outside the checkout."""

import importlib.metadata
import json
from pathlib import Path

import torch

import pyext
from pyext import functional

folder = Path(pyext.__file__).parent
found = {
    "torch": importlib.metadata.version("torch"),
    "torch_cuda": torch.version.cuda,
    "requires": importlib.metadata.requires("pyext-lab"),
    "package": str(folder),
    "libraries": sorted(path.name for path in folder.glob("*.so")),
    "backends": pyext.backends("cpu"),
}

from pyext import _introspect  # noqa: E402

found["build"] = _introspect.build_info()
for library in folder.glob("_C_cuda*.so"):
    found["kernels"] = len(_introspect.cuda_kernels(str(library)))

x = torch.tensor([-1.0, 0.0, 2.0])
found["relu"] = functional.relu(x, backend="extension").tolist()
print(json.dumps(found))
