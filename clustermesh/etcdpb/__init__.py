"""Generated from clustermesh/etcd.proto; see there."""
