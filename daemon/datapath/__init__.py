"""Desired tables to kernel maps; nothing else writes the kernel."""
