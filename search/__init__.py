"""Jobs, samplers, allocators, coordinator, worker, storage, report, export: the only room that knows Optuna and SQLAlchemy."""
