"""Every way to install the package, for real: downloads gigabytes and takes an hour."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "install" / "run.py"


@pytest.mark.exhaustive
@pytest.mark.timeout(4 * 3600)
def test_every_situation_of_the_readme_works():
    done = subprocess.run([sys.executable, SCRIPT], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
