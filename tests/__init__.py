"""Promises of the project, by package."""
