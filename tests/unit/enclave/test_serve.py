"""The serving enclave: who is served what, in which state, and what no user and no host can make it do."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from caltrain.attestation.simulated import SimulatedAttester
from caltrain.boundary import serving as m
from caltrain.boundary.channel import Channel
from caltrain.boundary.messages import Attest, Failed
from caltrain.boundary.sealed import seal_message, transcript_digest
from caltrain.crypto.dsse import open_envelope
from caltrain.enclave.serve import serving_main
from caltrain.errors import ProtocolError
from caltrain.exposure.subject import subject_of
from caltrain.models.weights import state_of
from caltrain.serving.package import GrantReceipt, ServedUser, UserCredential
from caltrain.serving.session import SessionSecret
from support.samples import refused, signer
from support.served import ServedWorld, served, tiny_subject
from support.tiny import CLASSES, MEASUREMENT, Element


@pytest.fixture
def world(tmp_path: Path) -> Iterator[ServedWorld]:
    with served(tmp_path, budget=10) as made:
        yield made.start()


@pytest.fixture
def new(tmp_path: Path) -> Iterator[ServedWorld]:
    with served(tmp_path, issuer=signer("issuer").public) as made:
        yield made


def code(error: dict[str, str] | None) -> str:
    assert error is not None
    return error["code"]


# -- answers -----------------------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "two-way": {},
    "mapped": {"mapped": True},
    "ternary": {"head": 2},
    "ternary, linear only": {"head": 1},
}


@pytest.mark.parametrize("form", FORMS)
def test_with_fixed_batches_every_answer_has_the_bits_of_the_unsplit_model(tmp_path: Path, form: str) -> None:
    with served(tmp_path, rows=16, fixed=True, **FORMS[form]) as world:
        una = world.start().session("una")
        for batch, count in enumerate((1, 3, 4)):
            records = world.pictures(count, seed=batch)
            answer = world.predict(batch, una.seal(records))[0]
            assert torch.equal(una.table(answer), world.expected(records, rows=16))


def test_with_fixed_batches_the_host_sees_as_many_records_whatever_was_asked(tmp_path: Path) -> None:
    with served(tmp_path, rows=16, fixed=True) as world:
        una = world.start().session("una")
        admitted, ir = world.infer(0, [una.seal(world.pictures(1))])
        assert (admitted.rows, [len(x) for x in ir]) == (1, [16])


@pytest.mark.parametrize(("across", "near"), [("f32", 1e-6), ("bf16", 0.1), ("int8", 0.1)])
@pytest.mark.parametrize("dtype", ["u8", "f32"])
def test_dynamic_batches_answer_as_the_unsplit_model_up_to_rounding(
    tmp_path: Path, across: str, near: float, dtype: Element
) -> None:
    with served(tmp_path, across=across, dtype=dtype, head=2, audit=1.0) as world:
        una = world.start().session("una")
        records = world.pictures(3)
        assert (una.table(world.predict(0, una.seal(records))[0]) - world.expected(records)).abs().max() < near


def test_requests_of_two_users_in_one_batch_are_answered_each_under_its_own_key(world: ServedWorld) -> None:
    una, pat = world.session("una"), world.session("pat")
    mine, theirs = world.pictures(1, seed=1), world.pictures(2, seed=2)
    answers = world.predict(0, una.seal(mine), pat.seal(theirs))
    torch.testing.assert_close(una.table(answers[0]), world.expected(mine))
    torch.testing.assert_close(pat.table(answers[1]), world.expected(theirs))
    for stranger, answer in ((pat, answers[0]), (una, answers[1])):
        with pytest.raises(Exception, match=r"sealed\.not-authentic"):
            stranger.open(answer, number=0)


def test_the_class_order_that_the_host_sees_is_not_the_true_one(tmp_path: Path) -> None:
    subject = tiny_subject(classes=CLASSES)
    seen = set()
    for number in range(8):
        with served(tmp_path / str(number), subject=subject, mapped=True) as world:
            una = world.start().session("una")
            records = world.pictures(1)
            _, ir = world.infer(0, [una.seal(records)])
            out = world.center(ir)
            seen.add(tuple(out[0][0].tolist()))
            answer = world.give(0, out).answers[0]
            torch.testing.assert_close(una.table(answer), world.expected(records))
    assert len(seen) > 1


def test_only_the_greatest_probabilities_are_answered_where_the_terms_say_so(tmp_path: Path) -> None:
    with served(tmp_path, top=2) as world:
        una = world.start().session("una")
        records = world.pictures(4)
        table, full = una.table(world.predict(0, una.seal(records))[0]), world.expected(records)
        least = full.argmin(1, keepdim=True)
        torch.testing.assert_close(table, full.scatter(1, least, 0.0))


def test_a_session_tells_the_names_of_the_classes_the_budget_and_what_the_enclave_is(world: ServedWorld) -> None:
    opened = world.session("una").opened
    assert (opened.classes, opened.budget_left, opened.simulated) == (CLASSES, 10, True)


def test_answers_tell_what_is_left_and_whether_the_center_was_audited(tmp_path: Path) -> None:
    for rate, audited in ((0.0, False), (1.0, True)):
        with served(tmp_path / str(rate), audit=rate, budget=9) as world:
            una = world.start().session("una")
            answer = una.open(world.predict(0, una.seal(world.pictures(2)))[0])
            assert (answer.audited, answer.budget_left) == (audited, 7)


def test_every_answer_to_as_many_records_has_one_size(world: ServedWorld) -> None:
    una = world.session("una")
    sizes = {len(world.predict(i, una.seal(world.pictures(2, seed=i)))[0]) for i in range(4)}
    assert len(sizes) == 1


# -- order and states --------------------------------------------------------------------------------------------------


def requests(world: ServedWorld) -> dict[str, m.ServingRequest]:
    """Every message, as far as it can be made without an answer."""
    envelope = world.opened.envelope
    return {
        "load": m.LoadPackage(envelope),
        "attest": Attest("serving", os.urandom(32).hex()),
        "grant": m.Grant(envelope),
        "open": m.OpenSession(envelope),
        "close": m.CloseSession("0" * 32),
        "infer": m.Infer(0, (b"x" * 100,)),
        "abandon": m.Abandon(0),
    }


def test_a_new_enclave_takes_a_package_and_nothing_else(new: ServedWorld) -> None:
    for name, message in requests(new).items():
        if name != "load":
            new.refused(message, "session.not-now")
    assert code(new.give(0, [torch.zeros(1)]).error) == "session.not-now"
    new.served(m.LoadPackage(new.opened.envelope))


def test_without_the_owners_key_nobody_is_served(new: ServedWorld) -> None:
    new.served(m.LoadPackage(new.opened.envelope))
    for name, message in requests(new).items():
        if name not in {"attest", "grant"}:
            new.refused(message, "session.not-now")
    assert not new.reads


def test_an_enclave_serves_one_package_and_takes_its_key_once(world: ServedWorld) -> None:
    world.refused(m.LoadPackage(world.opened.envelope), "session.not-now")
    world.refused(world.grant(), "session.not-now")


def test_evidence_is_for_serving_alone_and_binds_the_package(world: ServedWorld) -> None:
    world.refused(Attest("training", os.urandom(32).hex()), "attest.purpose")
    binding = world.attest().binding
    assert (binding.purpose, binding.plan) == ("serving", world.package.digest())


def test_stop_is_answered_and_ends_the_loop(tmp_path: Path) -> None:
    with served(tmp_path) as world:
        pass
    assert not world.threads[0].is_alive()
    assert not world.threads[1].is_alive()


def test_the_end_of_the_stream_ends_the_enclave(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"door\.closed"), served(tmp_path) as world:
        world.channel.close()
    assert not world.threads[0].is_alive()


# -- package and grant -------------------------------------------------------------------------------------------------


def test_a_package_for_another_program_is_refused(tmp_path: Path) -> None:
    with served(tmp_path, measurement="sha384:" + "cd" * 48) as world:
        world.refused(m.LoadPackage(world.opened.envelope), "evidence.not-the-packages")
        world.refused(Attest("serving", os.urandom(32).hex()), "session.not-now")


def test_a_manifest_that_was_touched_is_refused(new: ServedWorld) -> None:
    other = msgspec.structs.replace(new.opened.envelope, signatures=signer("owner").sign("x", {}).signatures)
    new.refused(m.LoadPackage(other), "signature.invalid")


def test_the_receipt_says_which_message_was_opened(new: ServedWorld) -> None:
    new.served(m.LoadPackage(new.opened.envelope))
    binding = new.attest().binding
    signed = new.served(new.grant(binding)).signed
    assert signed is not None
    receipt = open_envelope(signed, "grant-receipt", binding.signing_key, GrantReceipt, step="test")
    assert receipt.transcript == transcript_digest(binding, "owner")


def test_only_the_owner_grants_and_each_evidence_serves_once(new: ServedWorld) -> None:
    new.served(m.LoadPackage(new.opened.envelope))
    binding = new.attest().binding
    new.refused(new.grant(binding, by="una"), "signature.invalid")
    new.refused(new.grant(binding, key=bytes(32)), "sealed.not-authentic")
    new.refused(new.grant(binding), "nonce.unknown")
    new.served(new.grant())


@pytest.mark.parametrize("name", ["inside.sealed", "center.safetensors"])
def test_a_part_that_the_host_changed_is_refused_until_it_gives_the_right_one(tmp_path: Path, name: str) -> None:
    with served(tmp_path, audit=0.5) as world:
        honest = world.storage[name]
        world.served(m.LoadPackage(world.opened.envelope))
        for wrong in (honest[:-1], honest[:-1] + bytes([honest[-1] ^ 1]), honest + b"\0", b""):
            world.storage[name] = wrong
            world.refused(world.grant(), "package.other-part")
            world.refused(m.Infer(0, (b"x",)), "session.not-now")
        world.storage[name] = honest
        world.served(world.grant())


def test_the_centers_weights_are_read_only_where_they_are_needed(tmp_path: Path) -> None:
    for rate in (0.0, 0.5):
        with served(tmp_path / str(rate), audit=rate) as world:
            assert ("center.safetensors" in world.start().reads) == (rate > 0)


# -- sessions ----------------------------------------------------------------------------------------------------------


def test_whom_the_package_does_not_name_gets_no_session(world: ServedWorld) -> None:
    nonce = os.urandom(32).hex()
    binding = world.attest(nonce).binding
    world.refused(world.demand("eve", bytes(32), binding=binding)[0], "user.not-named")
    world.refused(world.demand("una", bytes(32), by="eve", binding=binding)[0], "user.not-named")
    world.refused(world.demand("una", bytes(32), by="pat", binding=binding)[0], "user.not-named")
    world.served(world.demand("una", bytes(32), binding=binding)[0])  # and the nonce of the refused is not spent


def credential(
    world: ServedWorld, *, by: str = "issuer", package: str | None = None, name: str = "kim"
) -> dict[str, object]:
    user = ServedUser(name=name, public_key=signer("kim").public, budget=5)
    signed = UserCredential(package=package or world.package.digest(), user=user)
    return {"credential": signer(by).sign("user-credential", signed)}


def test_a_credential_of_the_issuer_names_a_user_with_a_budget(new: ServedWorld) -> None:
    kim = new.start().session("kim", **credential(new))
    assert kim.opened.budget_left == 5
    other = new.package.digest()[:-1] + ("0" if new.package.digest()[-1] != "0" else "1")
    for wrong, why in (
        (credential(new, by="una"), "signature.invalid"),
        (credential(new, package=other), "user.not-named"),
        (credential(new, name="lee"), "user.not-named"),
    ):
        new.refused(new.demand("kim", bytes(32), **wrong)[0], why)  # type: ignore[arg-type]


def test_users_of_the_issuer_keep_nobody_out_whom_the_package_names(
    new: ServedWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caltrain.enclave.sessions.MAX_USERS_COUNTED", len(new.package.terms.users))
    new.start()
    new.refused(new.demand("kim", bytes(32), **credential(new))[0], "user.too-many")  # type: ignore[arg-type]
    new.session("una")


def test_a_demand_is_taken_once_and_only_by_the_enclave_it_was_sealed_for(world: ServedWorld) -> None:
    demand, _ = world.demand("una", bytes(32))
    world.served(demand)
    world.refused(demand, "nonce.unknown")
    foreign = msgspec.structs.replace(world.attest().binding, plan="sha256:" + "0" * 64)
    world.refused(world.demand("una", bytes(32), binding=foreign)[0], "sealed.malformed")


def test_a_grant_is_no_demand_for_a_session(world: ServedWorld) -> None:
    binding = world.attest().binding
    envelope = seal_message("grant", SessionSecret(key=bytes(32)), binding=binding, sender="una", signer=signer("una"))
    world.refused(m.OpenSession(envelope), "signature.invalid")


def test_a_closed_session_is_unknown_but_what_it_asked_is_answered(world: ServedWorld) -> None:
    una = world.session("una")
    records = world.pictures(1)
    _, ir = world.infer(0, [una.seal(records)])
    world.served(m.CloseSession(una.opened.session))
    world.served(m.CloseSession(una.opened.session))
    torch.testing.assert_close(una.table(world.give(0, world.center(ir)).answers[0]), world.expected(records))
    admitted, _ = world.infer(1, [una.seal(records)])
    assert code(admitted.refused[0]) == "session.unknown"


# -- requests ----------------------------------------------------------------------------------------------------------


def refused_code(world: ServedWorld, batch: int, frame: bytes) -> str:
    """Why a request is refused, alone in its batch: then no IR is made."""
    admitted, ir = world.infer(batch, [frame])
    assert (admitted.rows, ir, list(admitted.refused)) == (0, (), [0])
    return code(admitted.refused[0])


def test_a_refused_request_makes_no_ir_and_leaves_the_others_alone(world: ServedWorld) -> None:
    una = world.session("una")
    records = world.pictures(1)
    admitted, ir = world.infer(0, [b"nonsense", una.seal(records), una.seal(records, number=0)])
    assert {place: code(error) for place, error in admitted.refused.items()} == {
        0: "request.malformed",
        2: "request.replayed",
    }
    assert [len(x) for x in ir] == [admitted.rows] == [1]
    answers = world.give(0, world.center(ir)).answers
    assert list(answers) == [1]


def test_numbers_of_a_lane_only_rise_and_lanes_do_not_mind_each_other(world: ServedWorld) -> None:
    una = world.session("una")
    records = world.pictures(1)
    world.predict(0, una.seal(records, number=5))
    assert refused_code(world, 1, una.seal(records, number=5)) == "request.replayed"
    assert refused_code(world, 2, una.seal(records, number=4)) == "request.replayed"
    world.predict(3, una.seal(records, number=9))
    world.predict(4, una.seal(records, lane=255, number=0))


def test_a_forged_request_is_refused_and_does_not_move_its_lane(world: ServedWorld) -> None:
    una = world.session("una")
    records = world.pictures(1)
    honest = una.seal(records, number=7)
    for spoilt in (honest[:-1] + bytes([honest[-1] ^ 1]), una.keys.seal_request(1, 7, records.tobytes())[:-1]):
        assert refused_code(world, 0, spoilt) == "sealed.not-authentic"
    moved = honest[:17] + b"\x02" + honest[18:]
    assert refused_code(world, 0, moved) == "sealed.not-authentic"
    world.predict(0, honest)
    world.predict(1, una.seal(records, lane=2, number=7))


def test_a_request_of_another_session_is_refused(world: ServedWorld) -> None:
    una, pat = world.session("una"), world.session("pat")
    frame = una.seal(world.pictures(1))
    as_pat = frame[:1] + bytes.fromhex(pat.opened.session) + frame[17:]
    assert refused_code(world, 0, as_pat) == "sealed.not-authentic"
    nobody = frame[:1] + bytes(16) + frame[17:]
    assert refused_code(world, 0, nobody) == "session.unknown"
    world.predict(0, frame)


def test_what_is_no_number_of_whole_records_is_refused_and_not_charged(world: ServedWorld) -> None:
    una = world.session("una")
    for raw in (b"", b"x" * 15, b"x" * 17, bytes(16 * 5)):
        assert refused_code(world, 0, una.seal(raw)) == "request.rows"
    answer = world.predict(0, una.seal(world.pictures(4)))[0]
    assert una.open(answer).budget_left == 6


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_records_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    with served(tmp_path, dtype="f32") as world:
        una = world.start().session("una")
        records = world.pictures(2)
        records[1, 0, 3, 3] = value
        assert refused_code(world, 0, una.seal(records)) == "request.rows"
        assert world.session("una").opened.budget_left == una.opened.budget_left


@pytest.mark.parametrize("fixed", [False, True])
def test_records_that_overflow_the_model_are_refused_and_harm_nobody_elses(tmp_path: Path, fixed: bool) -> None:
    with served(tmp_path, dtype="f32", fixed=fixed) as world:
        una, pat = world.start().session("una"), world.session("pat")
        huge, honest = world.pictures(1), world.pictures(2, seed=1)
        huge[0] = 3e38
        admitted, ir = world.infer(0, [una.seal(huge), pat.seal(honest)])
        assert {place: code(error) for place, error in admitted.refused.items()} == {0: "request.rows"}
        assert ([len(x) for x in ir], admitted.rows) == ([4 if fixed else 2], 2)
        answer = world.give(0, world.center(ir)).answers[1]
        torch.testing.assert_close(pat.table(answer), world.expected(honest))
        assert refused_code(world, 1, una.seal(huge)) == "request.rows"


def test_a_batch_has_no_more_records_than_the_package_says(world: ServedWorld) -> None:
    una, pat = world.session("una"), world.session("pat")
    admitted, ir = world.infer(0, [una.seal(world.pictures(3)), pat.seal(world.pictures(2))])
    assert (code(admitted.refused[1]), admitted.rows, len(ir[0])) == ("serving.batch-full", 3, 3)
    assert world.session("pat").opened.budget_left == 10


def test_a_budget_counts_records_over_all_sessions_of_a_key(world: ServedWorld) -> None:
    first, second = world.session("una"), world.session("una")
    world.predict(0, first.seal(world.pictures(4)))
    world.predict(1, second.seal(world.pictures(4)))
    assert refused_code(world, 2, first.seal(world.pictures(3))) == "user.budget-spent"
    assert first.open(world.predict(2, first.seal(world.pictures(2)))[0]).budget_left == 0
    assert refused_code(world, 3, second.seal(world.pictures(1))) == "user.budget-spent"
    assert world.session("una").opened.budget_left == 0
    world.predict(4, world.session("pat").seal(world.pictures(4)))


def test_two_requests_of_one_batch_share_the_budget(world: ServedWorld) -> None:
    una = world.session("una")
    world.predict(0, una.seal(world.pictures(4)))
    world.predict(1, una.seal(world.pictures(4)))
    admitted, _ = world.infer(2, [una.seal(world.pictures(2)), una.seal(world.pictures(1))])
    assert (admitted.rows, code(admitted.refused[1])) == (2, "user.budget-spent")


# -- the center --------------------------------------------------------------------------------------------------------


def test_batches_are_answered_in_whatever_order_the_center_gives_them(world: ServedWorld) -> None:
    una = world.session("una")
    asked = {batch: world.pictures(1, seed=batch) for batch in (7, 3)}
    irs = {batch: world.infer(batch, [una.seal(asked[batch], lane=batch)])[1] for batch in asked}
    for batch in (3, 7):
        answer = world.give(batch, world.center(irs[batch])).answers[0]
        torch.testing.assert_close(una.table(answer, lane=batch), world.expected(asked[batch]))


WRONG = {
    "another number of records": lambda out: [x[:1] for x in out],
    "another shape": lambda out: [x[:, :2] for x in out],
    "another number of dimensions": lambda out: [x.flatten() for x in out],
    "two tensors": lambda out: [*out, *out],
    "other elements": lambda out: [x.to(torch.bfloat16) for x in out],
    "NaN": lambda out: [x.index_fill(1, torch.tensor([0]), torch.nan) for x in out],
    "infinity": lambda out: [x.index_fill(1, torch.tensor([0]), -torch.inf) for x in out],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("fixed", [False, True])
def test_an_output_that_cannot_be_one_fails_its_batch_and_no_other(tmp_path: Path, wrong: str, fixed: bool) -> None:
    with served(tmp_path, fixed=fixed, head=1) as world:
        una = world.start().session("una")
        frames = [una.seal(world.pictures(2), lane=lane) for lane in range(2)]
        irs = [world.infer(batch, [frame])[1] for batch, frame in enumerate(frames)]
        answered = world.give(0, WRONG[wrong](world.center(irs[0])))
        assert (code(answered.error), answered.answers, answered.batch) == ("center.malformed", {}, 0)
        assert code(world.give(0, world.center(irs[0])).error) == "center.malformed"  # it is forgotten
        assert world.give(1, world.center(irs[1])).error is None


def test_an_output_with_which_the_head_overflows_is_no_output(tmp_path: Path) -> None:
    plain = tiny_subject()
    state = state_of(plain.module)
    state = {name: value * 1e22 if name.startswith("5.") else value for name, value in state.items()}
    with served(tmp_path, subject=subject_of(plain.spec, plain.data, state), head=1) as world:
        una = world.start().session("una")
        _, ir = world.infer(0, [una.seal(world.pictures(1))])
        huge = [torch.where(x > 0, 1e18, -1e18) for x in world.center(ir)]
        assert code(world.give(0, huge).error) == "center.malformed"


@pytest.mark.parametrize(
    "head", [{"step": 8}, {"role": "eval-out"}, {"run": "0" * 32}, {"epoch": 1}], ids=lambda head: next(iter(head))
)
def test_an_output_that_was_never_asked_for_is_refused(world: ServedWorld, head: dict[str, object]) -> None:
    una = world.session("una")
    _, ir = world.infer(0, [una.seal(world.pictures(1))])
    answered = world.give(0, world.center(ir), **head)
    assert (code(answered.error), answered.batch) == ("center.malformed", head.get("step", 0))
    again = world.give(0, world.center(ir))
    assert (again.error is None) == ("step" in head)  # a batch that it does not name goes on


@pytest.mark.parametrize(("across", "apart"), [("f32", 1e-3), ("bf16", 0.1), ("int8", 0.1)])
def test_an_audited_output_of_another_model_is_refused(tmp_path: Path, across: str, apart: float) -> None:
    with served(tmp_path, audit=1.0, across=across) as world:
        una = world.start().session("una")
        _, ir = world.infer(0, [una.seal(world.pictures(3))])
        out = world.center(ir)
        out[0] = out[0].clone()
        if across == "int8":
            out[0][1, 0] = out[0][1, 0] // 2 + 40
        else:
            out[0][1, 0] += apart * out[0][1].abs().max()
        assert una.open(world.predict(9, una.seal(world.pictures(1), lane=1))[0], lane=1).wrong == 0
        answered = world.give(0, out)
        assert (code(answered.error), answered.answers) == ("center.wrong", {})
        later = una.open(world.predict(10, una.seal(world.pictures(1), lane=1))[0], lane=1)
        assert (later.audited, later.wrong) == (True, 1)


def test_an_output_that_is_no_number_is_malformed_before_anything_is_compared(tmp_path: Path) -> None:
    with served(tmp_path, audit=1.0) as world:
        una = world.start().session("una")
        _, ir = world.infer(0, [una.seal(world.pictures(1))])
        assert code(world.give(0, [x * torch.nan for x in world.center(ir)]).error) == "center.malformed"


def test_an_output_that_is_not_audited_is_believed(world: ServedWorld) -> None:
    una = world.session("una")
    _, ir = world.infer(0, [una.seal(world.pictures(1))])
    answered = world.give(0, [x + 1 for x in world.center(ir)])
    assert (answered.error, una.open(answered.answers[0]).audited) == (None, False)


def test_an_abandoned_batch_is_forgotten_and_stays_charged(world: ServedWorld) -> None:
    una = world.session("una")
    _, ir = world.infer(0, [una.seal(world.pictures(4))])
    assert world.ask(m.Abandon(0)) == m.Answered(0)
    world.refused(m.Abandon(0), "serving.no-batch")
    assert code(world.give(0, world.center(ir)).error) == "center.malformed"
    assert world.session("una").opened.budget_left == 6


def test_no_more_batches_are_held_than_agreed_and_a_number_serves_one_at_a_time(world: ServedWorld) -> None:
    una = world.session("una")
    world.infer(0, [una.seal(world.pictures(1))])
    known = una.seal(world.pictures(1))
    world.refused(m.Infer(0, (known,)), "serving.batch-known")
    for batch in range(1, m.MAX_BATCHES):
        world.infer(batch, [una.seal(world.pictures(1), lane=batch)])
    world.refused(m.Infer(m.MAX_BATCHES, (known,)), "serving.too-many-batches")
    world.ask(m.Abandon(1))
    world.predict(1, known)  # it was not looked at before


# -- what comes through the door ---------------------------------------------------------------------------------------


def test_a_message_that_is_none_is_refused_and_the_service_goes_on(world: ServedWorld) -> None:
    world.channel.send(m.Served())
    reply = world.channel.receive(m.SERVING_REPLIES)
    assert isinstance(reply, Failed)
    assert (reply.error["code"], reply.fatal) == ("door.unexpected", False)
    world.session("una")


def test_a_tensor_that_is_none_is_refused_and_the_service_goes_on(world: ServedWorld) -> None:
    world.sock.sendall(b"\x06\x00\x00\x00\x02" + b"\xff\xff\x00\x00\x00")
    reply = world.channel.receive(m.SERVING_REPLIES)
    assert isinstance(reply, Failed)
    assert (reply.error["code"], reply.fatal) == ("tensor.malformed", False)
    world.session("una")


def test_a_stream_that_is_out_of_step_ends_the_enclave() -> None:
    (ours, theirs), (storage, far) = socket.socketpair(), socket.socketpair()
    with ours, theirs, storage, far:
        ours.sendall(b"\x06\x00\x00\x00\x07" + bytes(5))
        attester = SimulatedAttester(signer("root"), measurement=MEASUREMENT)
        ours.shutdown(socket.SHUT_WR)
        with refused(ProtocolError, "frame.malformed"):
            serving_main(Channel(theirs), attester, Channel(storage))


def test_what_no_one_foresaw_is_told_without_its_words(world: ServedWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_more: object) -> None:
        raise ValueError("secret 4711")

    una = world.session("una")
    _, ir = world.infer(0, [una.seal(world.pictures(1))])
    out = world.center(ir)
    with monkeypatch.context() as patch:
        patch.setattr("caltrain.enclave.served_model.Network.through", fail)
        answered = world.give(0, out)  # two-way: nothing of the enclave's own is computed
        assert answered.error is None
        error = world.refused(m.Infer(1, (una.seal(world.pictures(1)),)), "enclave.internal")
    assert "4711" not in str(error)
    assert world.ask(m.Infer(1, (b"x",))).refused  # type: ignore[union-attr]


def test_a_head_that_fails_unexpectedly_is_told_as_the_batchs_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_more: object) -> None:
        raise ValueError("secret 4711")

    with served(tmp_path, head=1) as world:
        una = world.start().session("una")
        _, ir = world.infer(0, [una.seal(world.pictures(1))])
        out = world.center(ir)
        with monkeypatch.context() as patch:
            patch.setattr("caltrain.enclave.served_model.Network.through", fail)
            answered = world.give(0, out)
        assert code(answered.error) == "enclave.internal"
        assert "4711" not in str(answered.error)
