"""`python -m orchestrator`: the same as `distill`."""

from orchestrator.cli import main

main()
