"""The CenterNet where a run begins or is taken up. Imports torch."""

from __future__ import annotations

from caltrain.boundary.messages import Done
from caltrain.errors import ProtocolError
from caltrain.host.center import Center
from caltrain.host.device import Choice, Device
from caltrain.host.kept import center_object
from caltrain.host.store import Store
from caltrain.models.weights import State, decode_state
from caltrain.models.wheel import load_wheel, no_wheel
from caltrain.plan import Plan
from caltrain.training.initial import load_initial

_LENGTH = 8


def begin_center(plan: Plan, store: Store, done: Done, *, records: int, device: Choice) -> Center:
    """The CenterNet at the place that the enclave names: as it was kept there, or as its seed and the plan begin it."""
    wheel, initial, at = plan.model.wheel, plan.training.initial, done.at or (0, 0)
    center = Center(
        plan,
        seed=done.center_seed,
        records=records,
        front=done.front,
        device=Device.choose(device, plan),
        factory=load_wheel(store.read_whole("wheel"), wheel) if wheel else no_wheel,
    )
    if at != (0, 0):
        center.restore(decode_state(store.read_whole(center_object(*at)), step="resume"))
    elif initial:
        center.start_from(load_initial(store.read_whole("initial"), initial))
    return center


def moved_out(store: Store) -> State:
    """State of the layers that the enclave let out with a shallower cut. Raises ProtocolError `cut.cut-short`."""
    raw = store.read_whole("center-moved")
    length = int.from_bytes(raw[:_LENGTH], "big")
    if len(raw) < _LENGTH + length:
        raise ProtocolError(
            "cut.cut-short",
            f"{len(raw)} bytes of the layers that came out, {_LENGTH + length} are due",
            step="move cut",
            fix="Look at the host's disk, then resume the run.",
        )
    # A longer one may have lain there before: it is written over, not cut.
    return decode_state(raw[_LENGTH : _LENGTH + length], step="move cut")
