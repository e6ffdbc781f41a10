"""The meshwall command."""
