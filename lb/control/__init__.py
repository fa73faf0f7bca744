"""The control plane: one asyncio process with the checks, the table, the admin API and what must be kept."""
