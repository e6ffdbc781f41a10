"""The policy language and everything that can be said about it; pure."""
