"""Prefect tasks, one per stage: retries, limits, names, artifacts and tracking. The computation is in `ogls.stages`."""
