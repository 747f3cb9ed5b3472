"""Settings of every test: one core, and nothing of ours uses what a package is about to remove."""

import os
from pathlib import Path

# Before anything imports torch. Two threads that wait for each other beside another test burn both cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent


def pytest_configure(config) -> None:
    """A deprecation warning is an error where the line that causes it is in one of our files, old or new."""
    for file in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")):
        for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
            config.addinivalue_line("filterwarnings", f"error::{kind}:{file.stem}$")
