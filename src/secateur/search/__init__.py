"""Searching over whole models: what a candidate is, and which is tried next. Knows neither methods nor models."""
