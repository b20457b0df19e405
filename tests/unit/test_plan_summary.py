"""What `caltrain plan check` says of a plan follows from the plan."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from caltrain.exposure.policy import Bound, Policy
from caltrain.models.layers import AvgPool, Conv, Linear, Shortcut
from caltrain.models.spec import Deepen, ModelSpec, Partition, Wheel
from caltrain.plan import ExposureSpec, Plan, check_plan
from caltrain.plan_summary import CutStep, PlanSummary, Zone, summarise
from caltrain.records.quarantine import FormerParty, Repair
from caltrain.training.spec import CenterSpec, InitialWeights
from support.members import Member
from support.tiny import MEASUREMENT, tiny_plan

DIGEST = "sha256:" + "0" * 64
MEMBERS, USERS = [Member("alpha"), Member("beta")], [Member("una"), Member("pat")]


def plan(*, training: dict[str, Any] | None = None, **changes: Any) -> Plan:
    """The tiny plan (1x4x4, conv, pool, conv, dropout, flatten, linear; cut at 2, head 2) with changes."""
    made = tiny_plan(MEMBERS, USERS, head=2, dtype="u8", epochs=4, budget=70, reveal=False)
    spec = msgspec.structs.replace(made.training, **(training or {}))
    return check_plan(msgspec.structs.replace(made, training=spec, **changes))


def test_a_plain_plan_has_one_cut_and_nothing_special() -> None:
    made = plan()
    assert summarise(made) == PlanSummary(
        name="tiny",
        digest=made.digest(),
        form="ternary",
        front_net=Zone(layers=2, learning=1, weights=4 * 9),
        center_net=Zone(layers=2, learning=1, weights=4 * 4 * 9),
        head_net=Zone(layers=2, learning=1, weights=16 * 3),
        ir_bytes_per_record=4 * 4 * 2 * 2,
        cut_by_epoch=None,
        cut_policy=None,
        epochs=4,
        batch=8,
        schedule="cosine",
        center="not audited",
        computes="cpu, f32",
        patience=None,
        checkpoints="between epochs",
        restart_needs="the word of 2 of 2 parties",
        wheel=None,
        initial=None,
        repair=None,
        reveal_seed=False,
        parties=("alpha", "beta"),
        users=("una may predict and trace and verdict, 70 inputs", "pat may predict, 70 inputs"),
        second_opinions=None,
        measurement=MEASUREMENT,
    )


def test_the_policy_for_the_cut_says_who_checks_it_and_what_it_takes_for_granted() -> None:
    bounds = Bound(measure="ssim", at_most=0.3, adversary="inverter"), Bound(measure="kl_ratio", at_least=1)
    told = summarise(plan(exposure=ExposureSpec(policy=Policy(bounds=bounds), every=2))).cut_policy
    assert told is not None
    assert told[:2] == (
        "inverter.ssim at most 0.3: attacked by every party, who votes",
        "kl_ratio at least 1: measured inside",
    )
    assert "does not know the FrontNet" in told[2]
    assert told[3] == "judged before every 2. epoch, from the first on"


def test_every_tensor_that_crosses_counts_and_the_cut_is_told_by_epoch() -> None:
    conv = Conv(filters=4)
    model = ModelSpec(layers=(conv, conv, conv, Shortcut(source=0), conv, AvgPool(), Linear(units=3)))
    partition = Partition(front=1, head=1, deepen=(Deepen(epoch=1, front=2), Deepen(epoch=3, front=4)))
    found = summarise(plan(model=model, partition=partition))
    tensor = 4 * 4 * 4 * 4
    assert found.ir_bytes_per_record == tensor
    # Layer 0's output is still read by the shortcut behind the cut at 2, so two tensors cross there.
    assert found.cut_by_epoch == (
        CutStep(epoch=0, front=1, ir_bytes=tensor),
        CutStep(epoch=1, front=2, ir_bytes=2 * tensor),
        CutStep(epoch=3, front=4, ir_bytes=tensor),
    )


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"partition": Partition(front=2)}, "form", "two-way"),
        ({"center": CenterSpec(audit_rate=0.25)}, "center", "audited at rate 0.25"),
        ({"center": CenterSpec(device="any")}, "computes", "any, f32: outside equal bits"),
        ({"center": CenterSpec(precision="bf16")}, "computes", "cpu, bf16: outside equal bits"),
        ({"training": {"patience": 3}}, "patience", "3 epochs: needs held-out records"),
        ({"training": {"checkpoint_steps": 50}}, "checkpoints", "every 50 steps"),
        ({"resume_quorum": 1}, "restart_needs", "the word of 1 of 2 parties"),
        (
            {"training": {"initial": InitialWeights(sha256=DIGEST, frozen=2)}},
            "initial",
            f"{DIGEST}, 2 layers frozen: the FrontNet is not secret",
        ),
    ],
)
def test_what_is_unusual_is_said(changes: dict[str, Any], field: str, said: str) -> None:
    assert getattr(summarise(plan()), field) != said
    assert getattr(summarise(plan(**changes)), field) == said


def test_a_repair_is_told_with_what_is_left_out() -> None:
    former = FormerParty(name="dogwood", public_key=Member("dogwood").signer.public)
    repair = Repair(run="ab" * 16, model=DIGEST, quarantine=DIGEST, records=4, without=(former,))
    assert summarise(plan(repair=repair)).repair == repair.in_words()


def test_second_opinions_are_told() -> None:
    spec = plan().trace
    for methods, said in ((("fingerprint",), None), (("fingerprint", "gradient", "trak"), ("gradient", "trak"))):
        changed = plan(trace=msgspec.structs.replace(spec, methods=methods))
        assert summarise(changed).second_opinions == said


def test_a_wheel_is_told_with_what_it_means() -> None:
    model = msgspec.structs.replace(plan().model, wheel=Wheel(sha256=DIGEST, factory="mystages:build"))
    said = f"{DIGEST}, mystages:build: its code runs inside: read it before approving"
    assert summarise(plan(model=model)).wheel == said


def test_a_users_pace_is_said() -> None:
    slow = tuple(msgspec.structs.replace(user, per_hour=12) for user in plan().users)
    assert summarise(plan(users=slow)).users == (
        "una may predict and trace and verdict, 70 inputs, at most 12 an hour",
        "pat may predict, 70 inputs, at most 12 an hour",
    )
