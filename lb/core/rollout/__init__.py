"""Rollouts, as decisions: what a plan is, what comes next, what is undone. No I/O."""
