"""Prefect alone: which stages run, in which order, with which retries and schedules. No arithmetic, no I/O."""
