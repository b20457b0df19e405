"""What a plan amounts to: what its readers would otherwise have to work out. Needs no torch."""

from __future__ import annotations

import math

import msgspec

from caltrain.exposure.policy import inside_bounds, key_of, weaker_adversary
from caltrain.models.layers import has_weights, sources_of, weights_of
from caltrain.models.spec import cut_shapes, layer_shapes, zone_ranges
from caltrain.plan import Plan, User

_ELEMENT = 4  # bytes: IRs leave as float32


class Zone(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the model: its layers, those of them that learn, and their weights without biases and normalisation."""

    layers: int
    learning: int
    weights: int


class CutStep(msgspec.Struct, frozen=True, kw_only=True):
    """From `epoch` on (counted from 0): layers of the FrontNet, bytes of IR that leave for one record."""

    epoch: int
    front: int
    ir_bytes: int


class PlanSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One field a line of `caltrain plan check`; None where the plan has no such thing."""

    name: str
    digest: str
    form: str
    front_net: Zone
    center_net: Zone
    head_net: Zone
    ir_bytes_per_record: int
    cut_by_epoch: tuple[CutStep, ...] | None
    cut_policy: tuple[str, ...] | None
    epochs: int
    batch: int
    schedule: str
    center: str
    computes: str
    patience: str | None
    checkpoints: str
    restart_needs: str
    wheel: str | None
    initial: str | None
    repair: str | None
    reveal_seed: bool
    parties: tuple[str, ...]
    users: tuple[str, ...]
    second_opinions: tuple[str, ...] | None
    measurement: str


def summarise(plan: Plan) -> PlanSummary:
    """What a checked plan amounts to; zones and IR are those of the first epoch. Raises nothing of its own."""
    training, front, parties = plan.training, plan.partition.front, len(plan.parties)
    front_net, center_net, head_net = _zones(plan)
    return PlanSummary(
        name=plan.name,
        digest=plan.digest(),
        form=plan.partition.form,
        front_net=front_net,
        center_net=center_net,
        head_net=head_net,
        ir_bytes_per_record=_ir_bytes(plan, front),
        cut_by_epoch=_cuts(plan),
        cut_policy=_policy(plan),
        epochs=training.epochs,
        batch=training.batch,
        schedule=training.schedule,
        center=f"audited at rate {plan.center.audit_rate:g}" if plan.center.audit_rate else "not audited",
        computes=_computes(plan),
        patience=f"{training.patience} epochs: needs held-out records" if training.patience else None,
        checkpoints=f"every {training.checkpoint_steps} steps" if training.checkpoint_steps else "between epochs",
        restart_needs=f"the word of {plan.resume_quorum or parties} of {parties} parties",
        wheel=_wheel(plan),
        initial=_initial(plan),
        repair=plan.repair.in_words() if plan.repair else None,
        reveal_seed=plan.release.reveal_seed,
        parties=tuple(party.name for party in plan.parties),
        users=tuple(_user(user) for user in plan.users),
        second_opinions=tuple(m for m in plan.trace.answered if m != "fingerprint") or None,
        measurement=plan.enclave.measurement,
    )


def _zones(plan: Plan) -> tuple[Zone, Zone, Zone]:
    shapes, layers = layer_shapes(plan.model, plan.data.shape), plan.model.layers

    def zone(part: range) -> Zone:
        return Zone(
            layers=len(part),
            learning=sum(has_weights(layers[i]) for i in part),
            weights=sum(weights_of(layers[i], shapes[sources_of(i, layers[i])[0] + 1]) for i in part),
        )

    front, center, head = zone_ranges(plan.model, plan.partition)
    return zone(front), zone(center), zone(head)


def _ir_bytes(plan: Plan, front: int) -> int:
    return _ELEMENT * sum(math.prod(shape) for shape in cut_shapes(plan.model, front, plan.data.shape))


def _cuts(plan: Plan) -> tuple[CutStep, ...] | None:
    if not plan.partition.deepen:
        return None
    steps = [(0, plan.partition.front), *((step.epoch, step.front) for step in plan.partition.deepen)]
    return tuple(CutStep(epoch=epoch, front=front, ir_bytes=_ir_bytes(plan, front)) for epoch, front in steps)


def _policy(plan: Plan) -> tuple[str, ...] | None:
    """What the cut may give away, by whom that is found out, and what is taken for granted of the adversary."""
    spec = plan.exposure
    if spec is None:
        return None
    inside = inside_bounds(spec.policy)
    bounds = [
        f"{key_of(bound)} {'at most' if bound.at_least is None else 'at least'} {bound.limit:g}: "
        + ("measured inside" if bound in inside else "attacked by every party, who votes")
        for bound in spec.policy.bounds
    ]
    return (*bounds, *weaker_adversary(spec.policy), f"judged before every {spec.every}. epoch, from the first on")


def _computes(plan: Plan) -> str:
    where = f"{plan.center.device}, {plan.center.precision}"
    return where if where == "cpu, f32" else f"{where}: outside equal bits"


def _wheel(plan: Plan) -> str | None:
    wheel = plan.model.wheel
    if wheel is None:
        return None
    return f"{wheel.sha256}, {wheel.factory}: its code runs inside: read it before approving"


def _initial(plan: Plan) -> str | None:
    initial = plan.training.initial
    if initial is None:
        return None
    return f"{initial.sha256}, {initial.frozen} layers frozen: the FrontNet is not secret"


def _user(user: User) -> str:
    pace = f", at most {user.per_hour} an hour" if user.per_hour else ""
    return f"{user.name} may {' and '.join(user.may)}, {user.budget} inputs{pace}"
