"""Values on the wire, where the golden cases do not reach."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustermesh import gojson, wire
from clustermesh.gojson import Malformed
from clustermesh.wire import CILIUM, STRICT, IpEntry

ADDRESSES = st.one_of(
    st.ip_addresses(v=4), st.ip_addresses(v=6).filter(lambda one: one.ipv4_mapped is None)
).map(str)
NAMES = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=20)


@given(ADDRESSES, ADDRESSES, st.integers(0, 2**32 - 1), NAMES, NAMES)
def test_an_address_entry_survives_the_wire(
    ip: str, host: str, identity: int, namespace: str, pod: str
) -> None:
    entry = wire.ip_entry(ip, identity, host, namespace, pod)
    assert wire.decode_ip(entry.prefix, wire.encode_ip(entry)) == entry


@given(ADDRESSES, st.integers(0, 2**32 - 1), NAMES)
def test_the_fast_way_and_the_general_way_agree(ip: str, identity: int, pod: str) -> None:
    value = wire.encode_ip(wire.ip_entry(ip, identity, "10.0.0.1", pod=pod))
    general = wire._decode_ip_document(gojson.parse(value.decode(), strict=True))
    assert wire.decode_ip(general.prefix, value) == general


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b'{"IP":"10.0.0.1","ID":1,"ID":2}', "duplicate_field"),
        (b'{"IP":"10.0.0.1","ID":1,"id":2}', "duplicate_field"),
        (b'{"IP":"10.0.0.1","ID":1,"Metadata":"\xff"}', "not_utf8"),
        (b'{"IP":"10.0.0.1","x":' + b"[" * 20 + b"]" * 20 + b"}", "too_deep"),
        (b'{"IP":"10.0.0.1","Metadata":"' + b"x" * 70_000 + b'"}', "too_large"),
        (b'{"IP":"10.0.0.1","ID":-0}', "json_type_or_range"),
        (b'{"IP":"10.0.0.1","ID":1e3}', "json_type_or_range"),
        (b'{"IP":"10.0.0.1","ID":true}', "json_type_or_range"),
        (b'{"IP":"10.0.0.1","ID":NaN}', "json_syntax"),
        (b'{"IP":"10.0.0.1","Metadata":"\n"}', "json_syntax"),
        (b'\xef\xbb\xbf{"IP":"10.0.0.1"}', "json_syntax"),
        (b"[" * 100_000, "too_large"),
    ],
)
def test_strict_reading_refuses(value: bytes, reason: str) -> None:
    with pytest.raises(Malformed) as found:
        wire.decode_ip("10.0.0.1", value)
    assert found.value.reason == reason


def test_reading_like_the_original_survives_a_tower_of_brackets() -> None:
    with pytest.raises(Malformed):
        wire.decode_ip("10.0.0.1", b"[" * 1_000_000, CILIUM)


def test_objects_under_one_name_are_merged_like_a_struct_is_filled() -> None:
    value = b'{"Name":"n","Cluster":"c","Labels":{"a":"1"},"labels":{"b":"2"},"ClusterID":3,"ClusterID":null}'
    node = wire.decode_node("n", value, CILIUM)
    assert node.labels == {"a": "1", "b": "2"}
    assert node.cluster_id == 3


def test_text_is_escaped_as_go_does() -> None:
    entry = IpEntry("10.0.0.1", pod='<a>&\u2028\x00\x7f"\\\b\f')
    written = b'"K8sPodName":"\\u003ca\\u003e\\u0026\\u2028\\u0000\x7f\\"\\\\\\b\\f"'
    assert written in wire.encode_ip(entry)


@pytest.mark.parametrize("part", ["", ".", "..", "a/b"])
def test_parts_that_would_change_a_keys_shape_are_refused(part: str) -> None:
    with pytest.raises(ValueError, match="cannot be part of a key"):
        wire.node_key("west", part)


def test_prefixes_with_host_bits_are_refused_when_strict_only() -> None:
    value = b'{"IP":"10.1.2.9","Mask":"////AA=="}'
    assert wire.decode_ip("10.1.2.9/24", value, STRICT).prefix == "10.1.2.9/24"
    with pytest.raises(Malformed, match="bits set"):
        _ = wire.decode_ip("10.1.2.9/24", value, STRICT).cidr


def test_the_label_string_has_one_label_per_key_in_byte_order() -> None:
    labels = ["k8s:b=1", "k8s:B=2", "container:b=3", "k8s:_c="]
    assert wire.encode_identity(labels, "west") == (
        b"k8s:B=2;k8s:_c=;container:b=3;k8s:io.cilium.k8s.policy.cluster=west;"
    )
