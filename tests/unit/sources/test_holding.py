"""What a directory means, given what it meant before."""

from daemon.model.problem import Problem
from daemon.model.rule import CidrGroup, Policy
from daemon.policy.ccnp import Parsed
from daemon.sources.holding import Held, accept_empty, effect, observe

BAD = Problem("f", 3, 1, "spec", "wrong")


def policy(name: str, file: str = "f", line: int = 1) -> Policy:
    return Policy(name, "", "CiliumClusterwideNetworkPolicy", file, line)


def says(*policies: Policy, problems: tuple[Problem, ...] = (), groups: tuple[CidrGroup, ...] = ()) -> Parsed:
    return Parsed(policies, groups, problems)


def names(held: Held) -> set[str]:
    return {key.name for key in effect(held).policies}


def test_a_broken_document_keeps_its_last_good_version_and_lets_the_others_change() -> None:
    held = observe(Held(), {"a": says(policy("one", line=1), policy("two"))})
    held = observe(held, {"a": says(policy("one", line=9), problems=(BAD,))})
    assert names(held) == {"one", "two"}
    assert {one.line for one in effect(held).policies.values()} == {9, 1}
    assert effect(held).problems == {"a": (BAD,)}


def test_a_file_that_stays_broken_keeps_the_version_that_was_good() -> None:
    held = observe(Held(), {"a": says(policy("one"))})
    for _ in range(3):
        held = observe(held, {"a": says(problems=(BAD,))})
    assert names(held) == {"one"}


def test_a_document_that_was_removed_from_a_good_file_is_gone() -> None:
    held = observe(Held(), {"a": says(policy("one"), policy("two"))})
    assert names(observe(held, {"a": says(policy("two"))})) == {"two"}


def test_a_warning_does_not_hold_anything_back() -> None:
    warning = Problem("f", 1, 1, "", "odd", severity="warning")
    held = observe(Held(), {"a": says(policy("one"))})
    held = observe(held, {"a": says(policy("two"), problems=(warning,))})
    assert names(held) == {"two"}


def test_removing_one_file_of_two_is_an_ordinary_change() -> None:
    held = observe(Held(), {"a": says(policy("one")), "b": says(policy("two"))})
    held = observe(held, {"b": says(policy("two"))})
    assert names(held) == {"two"}
    assert not held.waiting


def test_an_emptied_directory_keeps_enforcing_until_that_is_accepted() -> None:
    held = observe(Held(), {"a": says(policy("one"))})
    for found in ({}, {"a": says()}):
        emptied = observe(observe(held, found), {})
        assert emptied.waiting
        assert names(emptied) == {"one"}
    assert names(accept_empty(emptied)) == set()


def test_a_directory_that_comes_back_ends_the_waiting() -> None:
    held = observe(observe(Held(), {"a": says(policy("one"))}), {})
    held = observe(held, {"b": says(policy("two"))})
    assert not held.waiting
    assert names(held) == {"two"}


def test_a_directory_that_was_always_empty_waits_for_nothing() -> None:
    assert not observe(observe(Held(), {}), {}).waiting
    assert accept_empty(Held()) == Held()


def test_an_object_in_two_files_is_the_first_ones_and_said_so() -> None:
    held = observe(Held(), {"b": says(policy("one", "b")), "a": says(policy("one", "a"))})
    now = effect(held)
    assert [one.file for one in now.policies.values()] == ["a"]
    assert "also defined in a" in now.problems["b"][0].message


def test_groups_are_held_like_policies() -> None:
    group = CidrGroup("g", ())
    held = observe(Held(), {"a": says(groups=(group,))})
    held = observe(held, {"a": says(problems=(BAD,))})
    assert effect(held).groups == {"g": group}
