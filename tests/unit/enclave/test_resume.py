"""Resume: only the newest checkpoint of this very run, only with the words of a quorum that knows where it stands."""

from __future__ import annotations

import msgspec
import pytest
import torch

from caltrain.boundary import messages as m
from caltrain.crypto.digests import canonical_json
from caltrain.crypto.dsse import SigningKey
from caltrain.enclave.run import State
from caltrain.host.kept import center_object
from caltrain.models.weights import decode_state, encode_state
from caltrain.plan import Plan
from support.recovery import ends_as_if_undisturbed, last_word, newest, older, trained, with_header
from support.world import PARTIES, World, pictures

# --- another checkpoint -----------------------------------------------------------------------------------------


def test_an_older_checkpoint_in_place_of_the_newest_is_refused() -> None:
    world = trained()
    name, kept, old = world.newest_checkpoint(), bytes(newest(world)), bytes(world.host.storage[older(world)])
    world.restart()
    world.host.storage[name] = bytearray(old)
    world.done(world.resume(name))
    world.refused(last_word(world), "resume.older")
    assert world.run.front is None
    world.host.storage[name] = bytearray(kept)
    world.take_up()
    ends_as_if_undisturbed(world)


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_an_older_checkpoint_with_a_chain_that_was_cut_to_match_is_refused(cut: int) -> None:
    world = trained()
    head, name = world.host_head, older(world)
    world.restart()
    events = list(world.events)
    world.events = events[:-cut]
    world.done(world.resume(name))
    world.host.storage["chain.jsonl"] = bytearray(b"".join(msgspec.json.encode(e) + b"\n" for e in world.events))
    *others, last = world.parties
    for party in others:
        world.done(world.rejoin(party, head=head))  # they know more than the host shows
    world.refused(world.rejoin(last, head=head), "resume.other-chain")
    world.events = events
    world.take_up()
    ends_as_if_undisturbed(world)


@pytest.mark.parametrize("chain", [b"", b"\n", b"{}\n", b"no json\n"])
def test_a_chain_that_is_none_is_refused(chain: bytes) -> None:
    world = trained()
    world.restart()
    world.done(world.resume())
    word = last_word(world)
    world.host.on_read = lambda call: (
        m.Data(chain[call.offset :]) if call.name == "chain.jsonl" else world.host.read(call)
    )
    error = world.send(word)
    assert isinstance(error, m.Failed)
    assert error.error["code"] in {"resume.other-chain", "envelope.malformed", "payload.malformed"}
    assert (error.fatal, world.run.state) == (False, State.RESUMING)
    world.host.be_honest()
    world.take_up()


def test_a_chain_with_an_event_that_was_changed_left_out_or_made_up_is_refused() -> None:
    for attack in ("left out", "made up", "swapped"):
        world = trained()
        world.restart()
        world.done(world.resume())
        word, events = last_word(world), list(world.events)
        made = SigningKey().sign("event", world.chain_of_host()[-1])
        world.host.storage["chain.jsonl"] = bytearray(
            b"".join(
                msgspec.json.encode(e) + b"\n"
                for e in {
                    "left out": events[:5] + events[6:],
                    "made up": [*events[:-1], made],
                    "swapped": [*events[:4], events[5], events[4], *events[6:]],
                }[attack]
            )
        )
        honest = bytes(world.host.storage["chain.jsonl"])
        world.host.on_read = (
            lambda call, world=world, honest=honest: (  # type: ignore[misc]
                m.Data(honest[call.offset : call.offset + call.length])
                if call.name == "chain.jsonl"
                else world.host.read(call)
            )
        )
        world.refused(word, "signature.invalid" if attack == "made up" else "chain.broken")


def test_the_center_of_another_step_beside_the_newest_checkpoint_is_refused() -> None:
    world = trained()
    world.restart()
    world.done(world.resume())
    done = world.done(last_word(world))
    assert done.at == (1, 0)
    kept = bytes(world.host.storage[center_object(1, 0)])
    world.host.storage[center_object(1, 0)] = world.host.storage[center_object(0, 2)]
    world.center_after(done)
    world.refused(m.Train(1, 0), "center.other-state")
    world.host.storage[center_object(1, 0)] = bytearray(kept)
    world.take_up()
    ends_as_if_undisturbed(world)


def test_the_center_of_another_run_beside_the_newest_checkpoint_is_refused() -> None:
    world, other = trained(), trained(head=0)
    world.host.storage[center_object(1, 0)] = other.host.storage[center_object(1, 0)]
    state = decode_state(bytes(world.host.storage[center_object(1, 0)]), step="test")
    own = {name for name in state if name.startswith(("2.", "momentum/2."))}
    world.host.storage[center_object(1, 0)] = bytearray(encode_state({n: state[n] + 0 for n in own}))
    world.take_up()
    assert any(not torch.equal(state[n], world.host.the_center.zone.state()[n] + 1) for n in own)
    world.refused(m.Train(1, 0), "center.other-state")


def test_the_checkpoint_of_another_run_of_the_same_plan_is_refused() -> None:
    here, there = World(), World()
    there.parties, there.plan = here.parties, here.plan
    for world in (here, there):
        world.run_to(State.READY)
    here.restart()
    foreign = there.host.storage[there.newest_checkpoint()]
    name = here.newest_checkpoint()
    kept, here.host.storage[name] = here.host.storage[name], bytearray(foreign)
    here.done(here.resume(name))
    here.refused(here.rejoin("alpha"), "resume.other-run")
    here.refused(
        here.rejoin("beta", run=there.run.vault.run, head=there.host_head, data_key=bytes(32)), "sealed.not-authentic"
    )
    here.host.storage[name] = kept
    here.take_up()
    ends_as_if_undisturbed(here)


def test_the_checkpoint_of_another_run_is_refused_even_where_all_parties_sign_for_it() -> None:
    """They sign for that run and this chain's head: the chain is not that run's."""
    here, there = World(), World()
    there.parties, there.plan = here.parties, here.plan
    for world in (here, there):
        world.run_to(State.READY)
    here.restart()
    name = here.newest_checkpoint()
    here.host.storage[name] = bytearray(there.host.storage[there.newest_checkpoint()])
    here.done(here.resume(name))
    for party in ("alpha", "beta"):
        here.done(here.rejoin(party, run=there.run.vault.run))
    here.refused(here.rejoin("gamma", run=there.run.vault.run), "signature.invalid")


def renamed(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, name="another")


def test_another_plan_than_the_checkpoints_is_refused() -> None:
    world = trained()
    world.restart()
    request = msgspec.structs.replace(world.resume(), plan=canonical_json(renamed(world.plan)))
    world.refused(request, "resume.other-plan")
    assert world.run.plan is None
    world.take_up()


def test_a_header_that_claims_another_plan_does_not_open() -> None:
    world = trained()
    raw, other = newest(world), renamed(world.plan)
    kept = bytes(raw)
    raw[:] = with_header(bytes(raw), plan=other.digest())
    world.restart()
    honest, world.plan = world.plan, other
    world.done(m.Resume(canonical_json(other), name_of(world, bytes(raw))))
    world.refused(last_word(world), "sealed.not-authentic")
    world.plan = honest
    raw[:] = kept
    world.take_up()


def name_of(world: World, raw: bytes) -> str:
    return next(n for n, v in world.host.storage.items() if n.startswith("checkpoint-") and bytes(v) == raw)


def test_a_plan_with_other_keys_of_the_parties_is_another_plan() -> None:
    world = trained()
    world.restart()
    parties = tuple(msgspec.structs.replace(p, public_key=SigningKey().public) for p in world.plan.parties)
    other = msgspec.structs.replace(world.plan, parties=parties)
    world.refused(msgspec.structs.replace(world.resume(), plan=canonical_json(other)), "resume.other-plan")


def test_a_plan_for_another_program_is_refused_before_anything_is_read() -> None:
    world = trained()
    enclave = msgspec.structs.replace(world.plan.enclave, measurement="sha384:" + "cd" * 48)
    world.restart()
    world.host.log.clear()
    other = msgspec.structs.replace(world.plan, enclave=enclave)
    world.refused(m.Resume(canonical_json(other), "checkpoint-0"), "plan.other-measurement")
    assert not world.host.log


# --- after the run ------------------------------------------------------------------------------------------------


def test_the_budgets_of_model_users_survive_a_restart() -> None:
    world = World(budget=5).run_to(State.LINKED)
    for user, count in (("una", 2), ("pat", 1), ("una", 1)):
        asked = world.question("predict", pictures(count, seed=3), user=user)
        world.done(m.Query(user, asked.envelope))
    world.take_up()
    world.run_to(State.LINKED)
    assert world.run.spent == {"una": 3, "pat": 1}
    too_many = world.question("predict", pictures(3, seed=3))
    reply = world.send(m.Query("una", too_many.envelope))
    assert isinstance(reply, m.Failed)
    assert reply.error["code"] == "user.budget-spent"
    last = world.question("predict", pictures(2, seed=3))
    assert last.open(world.done(m.Query("una", last.envelope)).sealed["una"]).budget_left == 0


def test_an_answer_after_a_restart_is_the_same_answer() -> None:
    world = World().run_to(State.LINKED)
    inputs, tables = pictures(3, seed=4), []
    for _ in range(2):
        asked = world.question("predict", inputs)
        tables.append(asked.open(world.done(m.Query("una", asked.envelope)).sealed["una"]).scores)
        world.take_up()
        world.run_to(State.LINKED)
    assert tables[0] == tables[1]


@pytest.mark.parametrize("state", [State.RELEASED, State.LINKED])
def test_what_was_released_and_linked_is_not_another_model_after_a_restart(state: State) -> None:
    world = World().run_to(state)
    digest = world.run.model_digest
    world.take_up()
    world.run_to(State.LINKED)
    assert world.run.model_digest == digest
    kinds = [event.kind for event in world.chain()]
    assert (kinds.count("release"), kinds.count("link")) == (1, 1)
    assert {e.body["parties"] == list(PARTIES) for e in world.chain() if e.kind == "resume"} == {True}
