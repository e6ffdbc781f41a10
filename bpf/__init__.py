"""The data path: C sources, the layout of its maps, loader, feature probes and test runs."""
