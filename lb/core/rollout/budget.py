"""One budget of hosts out of service, for a whole run, whoever has put them out."""

from __future__ import annotations

from collections.abc import Collection

from lb.core.rollout.model import Deploy


def over_budget(deploy: Deploy, batch: Collection[str], down: Collection[str]) -> str | None:
    """Why the batch may not begin now, in one line; None: it may. `down`: hosts out of service at this moment.

    A batch whose hosts are all down already takes nothing away. A host that changes in service may fail in it: it
    counts as one that is taken out.
    """
    others = sorted(set(down) - set(batch))
    if set(batch) <= set(down) or len(others) + len(batch) <= deploy.max_unavailable:
        return None
    out = f"{', '.join(others)} out of service" if others else f"{len(batch)} at once"
    return f"budget: {out}; max_unavailable is {deploy.max_unavailable}"
