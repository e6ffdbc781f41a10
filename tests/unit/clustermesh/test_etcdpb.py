"""The committed generated code is what the .proto says."""

from pathlib import Path

import pytest

import clustermesh
from clustermesh.etcdpb import etcd_pb2


def test_generated_code_matches_the_proto(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc", reason="needs grpcio-tools")
    source = Path(clustermesh.__file__).parent
    out = tmp_path / "set"
    assert protoc.main(["", f"-I{source}", f"--descriptor_set_out={out}", "etcd.proto"]) == 0
    from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

    fresh = FileDescriptorSet.FromString(out.read_bytes()).file[0]
    committed = FileDescriptorProto()
    etcd_pb2.DESCRIPTOR.CopyToProto(committed)
    fresh.ClearField("syntax")
    committed.ClearField("syntax")
    for message in (*fresh.message_type, *committed.message_type):
        for one in message.field:
            one.ClearField("json_name")
    assert committed == fresh
