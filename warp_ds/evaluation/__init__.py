"""Verdicts on answers, utility metrics, and generation on any number of ranks."""
