"""Each module reads one outside thing and writes only its own rows."""
