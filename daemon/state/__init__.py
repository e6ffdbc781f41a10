"""The tables: the only mutable state that two modules share."""
