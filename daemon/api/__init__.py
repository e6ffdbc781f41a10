"""The HTTP API on the unix socket."""
