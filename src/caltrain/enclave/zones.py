"""The inner zones of a run: made, moved to another cut, and the center's as the audit repeats it."""

from __future__ import annotations

import torch

from caltrain.crypto.digests import same, to_raw
from caltrain.enclave.run import Run, present
from caltrain.errors import IntegrityError
from caltrain.models.network import Network, build, lay_out, zone_of
from caltrain.models.spec import zone_ranges
from caltrain.models.weights import State, decode_state, load_zone, model_digest, state_of
from caltrain.training.initial import MAX_INITIAL_BYTES, frozen_layers, load_initial, start_from
from caltrain.training.zone import MOMENTUM, Zone, of_layers

_SLACK = 1 << 20


def make_zones(run: Run) -> None:
    """FrontNet and HeadNet of the present cut, with the first weights that their seeds give."""
    front, _, head = zone_ranges(present(run.plan).model, run.partition)
    run.front = make_zone(run, front, run.seeds.front)
    run.head = make_zone(run, head, run.seeds.head) if head else None


def make_zone(run: Run, layers: range, seed: bytes) -> Zone:
    """A zone of this run's model."""
    plan = present(run.plan)
    return Zone(plan.model, layers, input_shape=plan.data.shape, training=plan.training, seed=seed, factory=run.factory)


def begin_weights(run: Run) -> None:
    """Where a run begins: the plan's public weights, if it names some, which the host keeps as `initial`.

    Where the center is audited, what it must begin with is noted. Raises ConfigError or IntegrityError.
    """
    plan, course = present(run.plan), present(run.course)
    center = center_zone(run) if plan.center.audit_rate else None
    if plan.training.initial is not None:
        state = load_initial(run.door.read_all("initial", limit=MAX_INITIAL_BYTES), plan.training.initial)
        for zone in (run.front, run.head, center):
            if zone is not None:
                start_from(zone.module, state, plan.model, frozen=frozen_layers(plan.model, plan.training))
    if center is not None:
        course.center = to_raw(model_digest(plan.model, center.state()))


def center_zone(run: Run) -> Zone:
    """The CenterNet of the present cut as its seed begins it."""
    return make_zone(run, zone_ranges(present(run.plan).model, run.partition)[1], run.seeds.center)


def same_center(run: Run) -> None:
    """Have the host commit to its CenterNet again, where the run is now. Raises IntegrityError `center.other-state`."""
    course = present(run.course)
    commitment = run.door.commit_center(course.epoch, course.step)
    if course.center and not same(commitment, course.center):
        raise IntegrityError(
            "center.other-state",
            "the host goes on with another CenterNet than the one that belongs to this step",
            step="commit center",
            fix="Resume from the checkpoint of the same step on both sides.",
        )
    course.center = commitment


def shown_center(run: Run, place: tuple[int, int], commitment: bytes) -> State:
    """The CenterNet's state before that step, as committed to. Raises IntegrityError `center.other-shown`."""
    raw = run.door.show_center(*place, limit=_center_limit(run))
    state = decode_state(raw, step="read center")
    if not same(to_raw(model_digest(present(run.plan).model, state)), commitment):
        raise IntegrityError(
            "center.other-shown",
            f"the CenterNet before step {place[0]}.{place[1]} is not the one that the host committed to",
            step="read center",
            fix="Stop trusting this host: it exchanged the CenterNet.",
        )
    return state


def inner_state(run: Run) -> State:
    """Weights of FrontNet and HeadNet."""
    return state_of(present(run.front).module, *([run.head.module] if run.head else []))


def joined(run: Run, center: State) -> Network:
    """The whole model of this moment, for inference, with the CenterNet's state as it was shown.

    Each zone takes exactly the tensors that are its own: a CenterNet with more in it would replace ours.
    """
    plan = present(run.plan)
    weights = {name: value for name, value in center.items() if not name.startswith(MOMENTUM)}
    inner, (front, middle, head) = inner_state(run), zone_ranges(plan.model, run.partition)
    model = build(plan.model, input_shape=plan.data.shape, factory=run.factory)
    for layers, state in ((front, of_layers(inner, front)), (middle, weights), (head, of_layers(inner, head))):
        load_zone(zone_of(model, plan.model, layers), state, step="join model")
    lay_out(model, channels_last=plan.training.channels_last)
    return model.eval()


def _center_limit(run: Run) -> int:
    """Bytes of weights and momentum, with room for names and shapes in the file's head."""
    plan = present(run.plan)
    with torch.device("meta"):
        layers = zone_ranges(plan.model, run.partition)[1]
        center = build(plan.model, input_shape=plan.data.shape, layers=layers, factory=run.factory)
    weights: int = sum(value.numel() * value.element_size() for value in center.state_dict().values())
    return 2 * weights + _SLACK
