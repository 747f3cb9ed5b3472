"""Settings of every test: our own files use nothing that is about to be removed from a package."""

from pathlib import Path

ROOT = Path(__file__).parent.parent


def pytest_configure(config) -> None:
    """A deprecation warning is an error where the line that causes it is in one of our files, old or new."""
    for file in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")):
        for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
            config.addinivalue_line("filterwarnings", f"error::{kind}:{file.stem}$")
