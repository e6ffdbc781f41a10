"""Cilium ClusterMesh's shared-etcd protocol; knows nothing of the daemon."""
