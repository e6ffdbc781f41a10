"""Which devices are filtered, so that each packet of this host is judged once and none is forgotten."""

from daemon.datapath.devices import chosen
from daemon.state.tables import Device


def device(index: int, name: str, kind: str = "", master: int = 0, lower: int = 0) -> Device:
    return Device(name, index, up=True, mac="", mtu=1500, kind=kind, master=master, lower=lower)


def names(*devices: Device, patterns: tuple[str, ...] = ("auto",)) -> list[str]:
    return [one.name for one in chosen(devices, patterns)]


def test_auto_leaves_out_loopback_and_what_belongs_to_containers():
    assert names(device(1, "lo"), device(2, "eth0"), device(3, "veth12"), device(4, "docker0")) == ["eth0"]


def test_ports_of_a_bond_or_team_are_left_to_it():
    for kind in ("bond", "team"):
        assert names(device(2, "eth0", master=4), device(3, "eth1", master=4), device(4, "up0", kind)) == [
            "up0"
        ]


def test_ports_of_a_bridge_are_left_to_it_whatever_it_is_called():
    assert names(device(2, "eth0", master=3), device(3, "br-ex", "bridge")) == ["br-ex"]
    assert names(device(2, "veth1", master=3), device(3, "br-0a", "bridge")) == []


def test_a_port_whose_master_is_not_filtered_is_filtered_itself():
    assert names(device(2, "eth0", master=3), device(3, "ovs-system", "openvswitch"), patterns=("eth*",)) == [
        "eth0"
    ]
    assert names(device(2, "eth0", master=9)) == ["eth0"]  # a master that is not listed


def test_members_of_a_vrf_are_filtered_and_the_vrf_is_not():
    assert names(device(2, "eth0", master=3), device(3, "blue", "vrf")) == ["eth0"]


def test_a_vlan_is_left_to_the_device_below_which_sees_through_the_tag():
    assert names(device(2, "eth0"), device(3, "eth0.10", "vlan", lower=2)) == ["eth0"]
    bond, vlan = device(2, "bond0", "bond"), device(3, "v10", "vlan", lower=2)
    assert names(bond, vlan, device(4, "m0", "macvlan", lower=3)) == ["bond0"]


def test_a_vlan_on_a_device_that_nobody_filters_is_filtered():
    assert names(device(2, "veth0"), device(3, "v10", "vlan", lower=2)) == ["v10"]
    assert names(device(3, "v10", "vlan", lower=0)) == ["v10"]  # the one below is in another namespace


def test_a_name_is_taken_as_it_is():
    here = (device(2, "eth0", master=4), device(3, "eth0.5", "vlan", lower=2), device(4, "bond0", "bond"))
    assert names(*here, patterns=("eth0", "eth0.5", "bond0")) == ["eth0", "eth0.5", "bond0"]
    assert names(*here, patterns=("eth*", "bond*")) == ["bond0"]
    assert names(*here, patterns=("eth0.5",)) == ["eth0.5"]
