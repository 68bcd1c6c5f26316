"""One thin Prefect task a stage. The work is in `ogls.stages`; here are retries, limits, names and artifacts."""
