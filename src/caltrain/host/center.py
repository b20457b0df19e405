"""The CenterNet, outside: takes IRs, gives back what the enclave needs for the step, steps its own optimiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.tensors import Role, TensorHead, refuse
from caltrain.crypto.digests import to_raw
from caltrain.errors import EnvironmentFault
from caltrain.host.device import Device
from caltrain.models.spec import zone_ranges
from caltrain.models.weights import State, encode_state, model_digest, state_of
from caltrain.models.wheel import Factory, no_wheel
from caltrain.plan import Plan
from caltrain.training.initial import frozen_layers, start_from
from caltrain.training.zone import At, Zone, of_layers

_KEPT = 2


class Center:
    """One run's CenterNet in training. Its only secret is its seed, from which nothing else follows."""

    def __init__(
        self,
        plan: Plan,
        *,
        seed: bytes,
        records: int,
        front: int | None = None,
        device: Device | None = None,
        factory: Factory = no_wheel,
    ) -> None:
        torch.set_num_threads(plan.training.threads)
        self._plan, self._seed, self._factory = plan, seed, factory
        self._device = device or Device.cpu()
        self._steps = records // plan.training.batch
        self._kept: dict[tuple[int, int], State] = {}
        self._half_way = False
        self.zone = self._make(plan.partition.front if front is None else front)

    def _make(self, front: int) -> Zone:
        plan = self._plan
        layers = zone_ranges(plan.model, plan.partition.at(front))[1]
        zone = Zone(
            plan.model,
            layers,
            input_shape=plan.data.shape,
            training=plan.training,
            seed=self._seed,
            factory=self._factory,
        )
        zone.module.to(self._device.name)
        return zone

    def take(self, head: TensorHead, tensors: Tensors, channel: Channel) -> None:
        """Tensors of a step. Two-way: the IR, then labels. Ternary: the IR, then the HeadNet's gradient."""
        ternary, at = self._plan.partition.head > 0, At(head.epoch, head.step, self._steps)
        self._expect(head.role, len(tensors))
        tensors, self._half_way = self._device.bring(tensors), head.role == "ir"
        with self._device.computing():
            match head.role:
                case "ir":
                    out = self.zone.forward(tensors, at=at, needs_input_grad=True)
                    if ternary:
                        self._send(channel, out, "center-out", head)
                case "eval-ir":
                    self._send(channel, self.zone.infer(tensors), "eval-out", head)
                case "labels" if not ternary:

                    def both(grads: list[Tensor], loss: float) -> None:
                        self._send(channel, [torch.tensor([loss])], "loss", head)
                        self._send(channel, grads, "ir-grad", head)

                    self.zone.backward_from_labels(tensors[0], at=at, early=both)
                case "center-grad" if ternary:
                    self.zone.backward(tensors, at=at, early=lambda grads: self._send(channel, grads, "ir-grad", head))
                case role:
                    raise refuse(f"{role} has no place in this run")

    def _expect(self, role: Role, count: int) -> None:
        """Refuse what is not as many tensors as cross at that end, and the second half of a step without its first."""
        takes, gives = len(self.zone.module.takes), len(self.zone.module.gives)
        due = {"ir": takes, "eval-ir": takes, "labels": 1, "center-grad": gives}
        if count != due.get(role, count):
            raise refuse(f"{count} tensors of {role}, {due[role]} cross there")
        if role in {"labels", "center-grad"} and not self._half_way:
            raise refuse(f"{role} before its forward pass")

    def commit(self, epoch: int, step: int) -> bytes:
        """Digest (32 bytes) of the state before that step, which is kept until the next but one commitment."""
        state = self.zone.state()
        self._kept[epoch, step] = state
        for old in list(self._kept)[:-_KEPT]:
            del self._kept[old]
        return to_raw(model_digest(self._plan.model, state))

    def committed(self, epoch: int, step: int) -> bytes:
        """The state that was committed to before that step, as safetensors."""
        if (epoch, step) not in self._kept:
            raise EnvironmentFault(
                "center.not-kept",
                f"no state of the CenterNet before step {epoch}.{step} is kept",
                step="show center",
                fix="Ask for one of the last two that were committed to.",
            )
        return encode_state(self._kept[epoch, step])

    def start_from(self, state: State) -> None:
        """Begin with those of the plan's public weights that belong here. Raises ConfigError, IntegrityError."""
        start_from(self.zone.module, state, self._plan.model, frozen=_frozen(self._plan))
        self._kept.clear()

    def restore(self, state: State) -> None:
        """Go on from a kept state. Raises IntegrityError `weights.malformed`."""
        self.zone.load(state, step="restore center")
        self._kept.clear()

    def recut(self, front: int, entered: State) -> None:
        """Go on behind a FrontNet of so many layers; `entered` is the state of layers that came out of it."""
        zone = self._make(front)
        state = dict(self.zone.state()) | dict(entered)
        zone.load(of_layers(state, zone.module.part), step="move cut")
        self.zone = zone
        self._kept.clear()

    def weights(self) -> bytes:
        """The present weights as safetensors."""
        return encode_state(state_of(self.zone.module))

    def _send(self, channel: Channel, tensors: Sequence[Tensor], role: Role, head: TensorHead) -> None:
        back = self._device.take_back(tensors)
        channel.send_tensors(back, role=role, run=head.run, epoch=head.epoch, step=head.step)


def _frozen(plan: Plan) -> int:
    return frozen_layers(plan.model, plan.training)
