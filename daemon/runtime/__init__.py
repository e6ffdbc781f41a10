"""The small imperative tool-box; imports nothing of ours."""
