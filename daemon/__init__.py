"""User space of meshwall: policy language, state, data-path reconcilers, flows, API and command line."""
