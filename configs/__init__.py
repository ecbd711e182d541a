"""Configurations, one file per row of the paper."""
