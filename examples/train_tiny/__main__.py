"""`python examples/train_tiny`."""

from __future__ import annotations

import sys
from pathlib import Path

from cyclopts import App, Parameter
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_tiny.run import run_stages
from train_tiny.settings import Settings

app = App(
    help="Train a small model with trees beside its dense twin and baselines.", default_parameter=Parameter(negative=())
)


@app.default
def main(settings: Settings | None = None, *, restart: bool = False) -> int:
    """Ctrl-C leaves a partial report. Run the same command again to resume.

    Parameters
    ----------
    restart
        Discard an earlier run in the same directory.
    """
    return run_stages(settings or Settings(), Console(), restart=restart)


if __name__ == "__main__":
    sys.exit(app(result_action="return_value"))
