"""A cut that the operator asks for: what may be asked, and whose word it needs."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from caltrain.crypto.dsse import Envelope, SigningKey
from caltrain.errors import ConfigError, IntegrityError
from caltrain.host.cuts import AskedCut
from caltrain.models.spec import Deepen
from caltrain.plan import CutApproval
from support.members import Member
from support.samples import refused
from support.tiny import tiny_plan

RUN, HEAD, OTHER = "0" * 32, "sha256:" + "1" * 64, "sha256:" + "2" * 64
MEMBERS = {name: Member(name) for name in ("alpha", "beta")}


@pytest.fixture
def asked() -> AskedCut:
    """Nothing is asked for yet; the plan begins with two layers and has three from epoch 3 on."""
    plan = tiny_plan(MEMBERS.values(), [], head=1, dtype="u8", epochs=9, budget=1, reveal=False)
    partition = msgspec.structs.replace(plan.partition, deepen=(Deepen(epoch=3, front=3),))
    return AskedCut(msgspec.structs.replace(plan, partition=partition))


def word(by: str, /, *, signer: SigningKey | None = None, **changes: Any) -> Envelope:
    honest = CutApproval(run=RUN, head=HEAD, party=by, front=2)
    return (signer or MEMBERS[by].signer).sign("move-cut", msgspec.structs.replace(honest, **changes))


def agree(asked: AskedCut, party: str, envelope: Envelope) -> None:
    asked.agree(party, envelope, run=RUN, head=HEAD)


def test_a_deeper_cut_needs_nobody_and_a_shallower_one_everybody(asked: AskedCut) -> None:
    assert asked.missing(2) == set()
    asked.ask(2, epoch=1)
    assert asked.missing(1) == asked.missing(2) == set()
    assert asked.missing(3) == {"alpha", "beta"}
    agree(asked, "alpha", word("alpha"))
    assert asked.missing(3) == {"beta"}
    agree(asked, "beta", word("beta"))
    assert asked.missing(3) == set()
    asked.done()
    assert (asked.front, asked.approvals) == (None, {})


def test_another_wish_takes_back_what_was_agreed(asked: AskedCut) -> None:
    asked.ask(2, epoch=1)
    agree(asked, "alpha", word("alpha"))
    asked.ask(2, epoch=2)
    assert asked.missing(4) == {"alpha", "beta"}


@pytest.mark.parametrize(("front", "epoch", "code"), [(1, 1, "below-plan"), (2, 3, "below-plan")])
def test_no_cut_below_the_plans_schedule(asked: AskedCut, front: int, epoch: int, code: str) -> None:
    with refused(ConfigError, f"cut.{code}"):
        asked.ask(front, epoch=epoch)
    assert asked.front is None


def test_no_cut_that_the_model_does_not_allow(asked: AskedCut) -> None:
    asked.ask(2, epoch=1)
    with refused(ConfigError, "model.partition"):
        asked.ask(5, epoch=1)
    assert asked.front == 2


@pytest.mark.parametrize(
    "envelope",
    [
        word("alpha", front=1),
        word("alpha", head=OTHER),
        word("alpha", run="f" * 32),
        word("alpha", party="beta"),
    ],
)
def test_a_word_for_another_cut_is_not_taken(asked: AskedCut, envelope: Envelope) -> None:
    asked.ask(2, epoch=1)
    with refused(IntegrityError, "cut.not-this"):
        agree(asked, "alpha", envelope)
    assert asked.approvals == {}


def test_a_word_by_another_key_or_without_a_wish_is_not_taken(asked: AskedCut) -> None:
    with refused(IntegrityError, "cut.not-this"):
        agree(asked, "alpha", word("alpha"))
    asked.ask(2, epoch=1)
    with refused(IntegrityError, "signature.invalid"):
        agree(asked, "alpha", word("alpha", signer=SigningKey()))
    assert asked.approvals == {}
