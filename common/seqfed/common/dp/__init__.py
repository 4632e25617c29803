"""Differential privacy: what a run's noise is worth (`accounting`), and the noise itself."""
