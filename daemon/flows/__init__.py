"""Kernel events to flows that a person can read."""
