"""`python -m lb.rollout …`: as `handoff deploy …`."""

from lb.rollout.cli import main

main()
