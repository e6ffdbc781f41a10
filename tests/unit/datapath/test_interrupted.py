"""A process that dies after any store: verdicts hold, and the next one brings everything in order."""

import importlib.util
from pathlib import Path

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from daemon.datapath.image import Image
from daemon.model.net import expand, parse_prefix

_spec = importlib.util.spec_from_file_location("image_tests", Path(__file__).with_name("test_image.py"))
assert _spec is not None
assert _spec.loader is not None
image_tests = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(image_tests)
compiled, documents, everything, read, claim, switch = (
    image_tests.compiled, image_tests.documents, image_tests.everything, image_tests.read, image_tests.claim,
    image_tests.switch,
)  # fmt: skip
DB, OWNED, SIZES, WEB = image_tests.DB, image_tests.OWNED, image_tests.SIZES, image_tests.WEB
kernel_model = image_tests.kernel_model
DEEP = {parse_prefix("2001:db8:1::/64"): WEB, parse_prefix("2001:db8:1:0:1::/80"): DB}


def heir_of(kernel):
    image = Image(SIZES)
    image.adopt(kernel_model.leftover(kernel))
    return image


def holds_only_what_it_should(kernel, image):
    """Every entry in the kernel is one that the process knows, with the slot that it knows."""
    found = {}
    for table in kernel_model.ADDRESS_TABLES:
        rows = kernel_model.entries(kernel, table)
        assert not found.keys() & rows.keys()
        found |= rows
    known = {expand(key): slot for key, slot in image.addresses.items()}
    assert found == {
        one: slot
        for one, slot in known.items()
        if one.family == 6 or (one.is_host and one.packed in kernel.tables["ip4_hosts"])
    }


@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.generate), derandomize=True)
@given(st.lists(st.tuples(documents(), st.integers(0, 60)), min_size=2, max_size=4))
def test_a_switch_that_was_cut_short_leaves_old_or_new_verdicts_and_is_made_good(history):
    kernel, image = kernel_model.Kernel(SIZES), Image(SIZES)
    kernel.run(claim(image, OWNED))
    kernel.run(switch(image, compiled([])))
    before = everything(compiled([]), dict(OWNED))
    for specs, stop in history:
        tables = compiled(specs)
        after = everything(tables, dict(OWNED))
        generation = image.generation
        kernel.run(image.switch(tables)[:stop])
        flipped = kernel.config("generation") != generation
        assert read(kernel, kernel.config("generation")) == (after if flipped else before)
        image = heir_of(kernel)
        kernel.run(
            claim(image, OWNED, [one for one in image_tests.owned_prefixes(image) if one not in OWNED])
        )
        assert read(kernel, kernel.config("generation")) == (after if flipped else before)
        kernel.run(switch(image, tables))
        assert read(kernel, kernel.config("generation")) == after
        holds_only_what_it_should(kernel, image)
        before = after


@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.generate), derandomize=True)
@given(documents(), st.integers(0, 12), st.integers(0, 12))
def test_addresses_that_changed_only_in_part_are_made_good(specs, first, second):
    kernel, image = kernel_model.Kernel(SIZES), Image(SIZES)
    tables = compiled(specs)
    kernel.run(claim(image, OWNED))
    kernel.run(switch(image, tables))
    owned = dict(OWNED)
    for put, delete, stop in ((DEEP, [parse_prefix("10.1.2.3")], first), (OWNED, list(DEEP), second)):
        gone = [one for one in delete if one not in put]
        kernel.run(claim(image, put, gone)[:stop])
        image = heir_of(kernel)
        owned = {one: who for one, who in {**owned, **put}.items() if one not in gone}
        kernel.run(
            claim(image, owned, [one for one in image_tests.owned_prefixes(image) if one not in owned])
        )
        kernel.run(switch(image, tables))
        assert read(kernel, image.generation) == everything(tables, owned)
        holds_only_what_it_should(kernel, image)


def test_slots_between_those_in_use_are_given_out_again_after_a_restart():
    kernel, image = kernel_model.Kernel(SIZES), Image(SIZES)
    tables = compiled([])
    kernel.run(switch(image, tables))
    addresses = [parse_prefix(f"10.77.0.{at}") for at in range(30)]
    for life in range(1, 12):
        for at, one in enumerate(addresses):
            kernel.run(claim(image, {one: image_tests.Identity(1000 * life + at)}))
        kernel.run(claim(image, {}, addresses[:-1]))
        image = heir_of(kernel)
        kernel.run(switch(image, tables))


def test_a_64_and_a_longer_prefix_in_it_may_come_together():
    kernel, image = kernel_model.Kernel(SIZES), Image(SIZES)
    tables = compiled([])
    kernel.run(switch(image, tables))
    kernel.run(claim(image, DEEP))
    holds_only_what_it_should(kernel, image)
