"""Who is believed when several claim one address."""

from daemon.model.identity import Identity
from daemon.state.ips import winner
from daemon.state.tables import IpRow

ONE, TWO, NONE = IpRow(Identity(70001)), IpRow(Identity(132000)), IpRow(Identity(0))


def test_local_truth_beats_a_file_and_a_file_beats_the_store():
    assert winner({"mesh:beta": TWO, "file": ONE}) == ONE
    assert winner({"file": TWO, "local": ONE}) == ONE


def test_this_hosts_own_cluster_beats_the_others():
    assert winner({"mesh:alpha": ONE, "mesh:beta": TWO}, "alpha") == ONE
    assert winner({"node:beta/b1": TWO, "node:alpha/a1": ONE}, "alpha") == ONE


def test_a_claim_to_one_address_beats_a_nodes_list_of_its_own():
    assert winner({"node:alpha/a1": TWO, "mesh:beta": ONE}, "alpha") == ONE


def test_two_clusters_that_disagree_make_an_address_nobodys():
    assert winner({"mesh:beta": ONE, "mesh:gamma": TWO}, "alpha") is None
    assert winner({"mesh:beta": ONE, "mesh:gamma": ONE}, "alpha") == ONE


def test_a_claim_without_an_identity_yet_does_not_contradict_one_that_has():
    assert winner({"mesh:beta": NONE, "mesh:gamma": ONE}, "alpha") == ONE
    assert winner({"mesh:beta": NONE}, "alpha") == NONE


def test_what_a_cluster_says_of_its_own_nodes_address_leaves_it_a_node() -> None:
    assert winner({"node:beta/b1": TWO, "mesh:beta": ONE}, "alpha") == TWO
    assert winner({"node:beta/b1": TWO, "mesh:beta": ONE, "mesh:gamma": ONE}, "alpha") is None
    assert winner({"node:alpha/a1": TWO, "mesh:alpha": ONE, "mesh:beta": ONE}, "alpha") == TWO
