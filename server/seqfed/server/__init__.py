"""The daemon: rounds, aggregation, store, services. It never loads torch."""
