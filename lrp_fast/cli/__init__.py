"""The command line: ``lrp-fast attribute``, ``attribute-dataset``, ``export``, ``evaluate``, ``demo`` and what there is to
choose: ``composites``, ``methods``, ``models``.

Exit codes: 0 all good, 1 an error, 2 a mistake in the command, 3 some pictures or methods failed, 130 interrupted
(Ctrl-C). What the commands offer comes from the registries of composites, splits, methods and models. A command is one
file here.
"""

from lrp_fast.cli import attribute, dataset, demo, evaluate, export, listing  # noqa: F401 - importing a command registers it
from lrp_fast.cli.common import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; the entry point ``lrp-fast``."""
    app()
