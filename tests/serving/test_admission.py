"""The profile of a request, and the decisions of engine core and workers, without a model."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import PoolingParams, SamplingParams
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError

from vllm_atomic_moe.engine.core import CoreProfiles, core_call
from vllm_atomic_moe.engine.requests import Admission, Loaded, Served, profile_of, slot_of
from vllm_atomic_moe.engine.worker import RankProfiles

SERVED = Served(3, "a", {"a": Loaded(0, "d0", 10), "b": Loaded(4, "d4", 20)})


# --- marks ----------------------------------------------------------------------------------------


def named(profile):
    return SamplingParams(extra_args={"profile": profile})


def test_a_request_gets_the_profile_that_it_names():
    admission = Admission(SERVED)
    for params, profile in (
        (SamplingParams(), "a"),
        (PoolingParams(), "a"),
        (named("b"), "b"),
        (named("a"), "a"),
        (PoolingParams(extra_kwargs={"profile": "b"}), "b"),
    ):
        mark = admission.mark_for(None, params)
        assert (profile_of(mark), slot_of(mark)) == (profile, SERVED.loaded[profile].slot)
    assert admission.mark_for(SERVED.mark("b", shown="model:b"), named("a")).lora_name == "model:b"


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("nobody", VLLMNotFoundError, "`nobody` is not loaded. Loaded are: a, b"),
        ("b", VLLMNotFoundError, "`b` is not loaded. Loaded are: a."),
        (7, VLLMValidationError, "`profile` is 7, wanted the name of a profile"),
        (["a"], VLLMValidationError, "wanted the name of a profile"),
    ],
)
def test_what_is_not_offered_is_refused(name, error, words):
    withdrawn = {**SERVED.loaded, "b": replace(SERVED.loaded["b"], offered=False)}
    served = replace(SERVED, loaded=withdrawn) if name == "b" else SERVED
    with pytest.raises(error, match=words):
        Admission(served).mark_for(None, named(name))


def test_block_hashes_tell_profiles_apart_and_nothing_else():
    """So do the keys of the prefix cache, and of any KV connector that keys by block hash."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    admit = CoreProfiles(FakeCore(SERVED)).admit

    def hashes(given, params=None):
        request = SimpleNamespace(lora_request=given, sampling_params=params or SamplingParams())
        admit(request)
        return Request(
            "id",
            list(range(64)),
            SamplingParams(max_tokens=1),
            None,
            lora_request=request.lora_request,
            block_hasher=get_request_block_hasher(16, sha256),
        ).block_hashes

    of_a, of_b = hashes(SERVED.mark("a")), hashes(SERVED.mark("b"))
    assert len(of_a) == len(of_b) == 4
    assert not set(of_a) & set(of_b)
    same = (SERVED.mark("b", shown="model:b"), SERVED.mark("b", shown="alias:b"))
    assert [hashes(mark) for mark in same] == [of_b, of_b]
    assert hashes(None) == of_a
    assert hashes(None, named("b")) == of_b


# --- the engine core's part, on workers that only answer ------------------------------------------


class FakeCore:
    """An engine core of two ranks; `asked` keeps their calls, `broken` cannot be loaded."""

    scheduler = SimpleNamespace(running=[], requests={})

    def __init__(self, served=SERVED, broken=""):
        self.asked, self.broken = [], broken
        self.model_executor = self
        self.profiles = {
            name: {"digest": profile.digest, "kept_atoms": profile.kept_atoms}
            for name, profile in served.loaded.items()
        }

    def collective_rpc(self, method, args):
        verb, arguments = args
        self.asked.append((verb, arguments.get("name"), arguments.get("slot")))
        if verb == "describe":
            return [{"ok": True, "active": "a", "profiles": self.profiles}] * 2
        failed = verb == "load" and arguments["name"] == self.broken
        return [{"ok": True}, {"ok": False, "error": "no"} if failed else {"ok": True}]


def test_states_are_numbered_and_the_highest_holds():
    fake = FakeCore()
    profiles = CoreProfiles(fake)
    start = profiles.served
    assert (start.generation, start.active) == (0, "a")
    load = {"digest": "d", "kept_atoms": 1, "publish": True}
    assert profiles.change("1", "load", "c", **load)["changed"]
    again = profiles.change("2", "load", "c", **load)
    assert (again["served"]["generation"], again["changed"]) == (1, False)
    assert profiles.change("3", "activate", "b", publish=True)["previous"] == "a"
    reached = profiles.served
    for older in (start, replace(start, generation=2)):
        profiles.apply(older.plain())
        assert profiles.served == reached
    fake.asked.clear()
    newer = replace(start, generation=9)
    for _ in range(2):
        assert profiles.apply(newer.plain()) == {"served": newer.plain()}
    assert fake.asked == [("free", None, 2), ("memory", None, None)]


def test_a_slot_that_changed_hands_is_loaded_again():
    fake = FakeCore()
    profiles = CoreProfiles(fake)
    fake.asked.clear()
    changed = {"a": SERVED.loaded["a"], "b": Loaded(1, "another file", 5)}
    profiles.apply(Served(5, "a", changed).plain())
    assert fake.asked == [("load", "b", 1), ("memory", None, None)]


def test_what_a_rank_cannot_load_changes_nothing():
    fake = FakeCore(broken="c")
    profiles = CoreProfiles(fake)
    before = profiles.served
    fake.asked.clear()
    with pytest.raises(Exception, match="rank 1: no") as refused:
        profiles.change("1", "load", "c", digest="d", kept_atoms=1)
    assert refused.value.kind == "RankError"
    assert profiles.served == before
    assert fake.asked == [("load", "c", 2), ("free", None, 2)]


def test_changes_take_turns():
    """The next change starts after the last one has ended, published or undone."""
    profiles = CoreProfiles(FakeCore())
    first = profiles.change("1", "activate", "b")
    second = profiles.change("2", "withdraw", "b")
    third = profiles.change("3", "load", "c", digest="d", kept_atoms=1)
    given_up = profiles.change("4", "activate", "a")
    assert [isinstance(it, Future) and not it.done() for it in (second, third, given_up)] == [
        True
    ] * 3
    assert (profiles.served.active, profiles.published.active) == ("b", "a")
    profiles.undo("4")
    assert profiles.undo("nobody's")["served"] == first["served"]
    profiles.undo("1")
    assert profiles.served.active == profiles.published.active == "a"
    assert profiles.served.generation > first["served"]["generation"]
    withdrawn = second.result()["served"]
    assert withdrawn["loaded"]["b"]["offered"] is False
    assert not third.done()
    profiles.publish("2", withdrawn)
    assert list(third.result()["served"]["loaded"]) == ["a", "b", "c"]
    profiles.publish("3", third.result()["served"])
    assert not given_up.done()
    assert profiles.served == profiles.published


def test_a_change_that_cannot_be_taken_back_ends_all_the_same():
    """Undo after a free, with the file gone: the remaining state is published."""
    fake = FakeCore()
    profiles = CoreProfiles(fake)
    profiles.change("1", "withdraw", "b", publish=True)
    profiles.change("2", "free", "b")
    waiting = profiles.change("3", "load", "c", digest="d", kept_atoms=1)
    fake.broken = "b"
    left = profiles.undo("2")["served"]
    assert list(left["loaded"]) == ["a"]
    assert profiles.published.plain() == left
    assert list(waiting.result()["served"]["loaded"]) == ["a", "c"]


def test_loading_offers_what_was_only_withdrawn():
    """The state after an interrupted unload."""
    profiles = CoreProfiles(FakeCore())
    known = {"digest": SERVED.loaded["b"].digest, "kept_atoms": SERVED.loaded["b"].kept_atoms}
    profiles.change("1", "withdraw", "b", publish=True)
    assert profiles.served.offered == ["a"]
    assert profiles.change("2", "load", "b", **known, publish=True)["changed"]
    assert profiles.served.offered == ["a", "b"]
    with pytest.raises(Exception, match="'b' is offered to requests"):
        profiles.change("3", "free", "b", publish=True)


def test_nobody_frees_what_is_in_use():
    fake = FakeCore()
    profiles = CoreProfiles(fake)

    def refused(verb):
        reply = core_call(SimpleNamespace(atomic_moe_profiles=profiles), "change", verb)
        return reply["kind"], reply["error"]

    free = {"turn": "1", "verb": "free", "profile": "b", "publish": True}
    assert refused(free) == ("ProfileInUseError", "profile 'b' is offered to requests")
    withdraw = {**free, "verb": "withdraw"}
    profiles.change(**withdraw)
    assert refused(withdraw) == ("ProfileInUseError", "profile 'b' is being unloaded already")
    running = SimpleNamespace(lora_request=SERVED.mark("b"))
    fake.scheduler = SimpleNamespace(running=[running], requests={"r": running})
    assert refused(free) == ("ProfileInUseError", "profile 'b' has 1 requests; try again")
    fake.scheduler = SimpleNamespace(running=[], requests={})
    assert list(profiles.change(**free)["served"]["loaded"]) == ["a"]


def test_api_servers_are_told_when_there_is_news():
    profiles = CoreProfiles(FakeCore())
    first, second = profiles.follow(0, 0, []), profiles.follow(1, 0, ["b"])
    profiles.change("1", "activate", "b")
    assert not first.done(), "not yet published"
    state = profiles.served.plain()
    taken = profiles.taken(1)
    profiles.publish("1", state)
    for call in (first, second):
        assert call.result() == {"ok": True, "served": state}
    assert isinstance(profiles.follow(0, 1, []), Future)
    assert not taken.done()
    assert profiles.laggards(1) == {"servers": [1]}
    assert profiles.follow(1, 0, [])["served"] == state, "it did not hear the first time"
    profiles.follow(1, 1, ["a"])
    answer = taken.result()
    assert (answer["ok"], answer["held"]) == (True, ["a"])
    assert profiles.taken(1).done()


# --- one worker's part, without a model -----------------------------------------------------------


def test_both_runners_fill_the_same_slots():
    def rank():
        slots = torch.full((64,), 99, dtype=torch.int32)
        resident = SimpleNamespace(union=dict)
        return RankProfiles(resident, [], slots, Path(), Path(), 1), slots

    (one, by_counts), (two, by_offsets) = rank(), rank()
    marks = {"x": SERVED.mark("b"), "y": SERVED.mark("a"), "z": SERVED.mark("b")}
    for profiles in (one, two):
        new = [SimpleNamespace(req_id=key, lora_request=mark) for key, mark in marks.items()]
        profiles.note(SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=new))
        assert [request.lora_request for request in new] == [None] * 3, "the runner must not see it"
    one.fill_by_counts(["z", "y", "x"], np.array([1, 5, 7]))
    padded = torch.tensor([0, 1, 6, 13, 13, 13], dtype=torch.int32)
    two.fill_by_offsets(["z", "y", "x"], padded, 13)
    assert by_counts.tolist() == by_offsets.tolist() == [4] + [0] * 5 + [4] * 7 + [99] * 51
    one.note(SimpleNamespace(finished_req_ids={"x"}, scheduled_new_reqs=[]))
    with pytest.raises(KeyError):
        one.slots_of(["x"])
