"""The CenterNet, outside: takes IRs, gives back what the enclave needs for the step, steps its own optimiser."""

from __future__ import annotations

import torch
from torch import Tensor

from caltrain.boundary.channel import Channel
from caltrain.boundary.tensors import Role, TensorHead, refuse
from caltrain.crypto.digests import to_raw
from caltrain.models.network import zone_ranges
from caltrain.models.weights import encode_state, model_digest, state_of
from caltrain.plan import Plan
from caltrain.training.zone import Zone


class Center:
    """One run's CenterNet in training. Its only secret is its seed, from which nothing else follows."""

    def __init__(self, plan: Plan, *, seed: bytes, records: int) -> None:
        torch.set_num_threads(plan.training.threads)
        self._plan = plan
        self._steps = records // plan.training.batch
        layers = zone_ranges(plan.model, plan.partition)[1]
        self._zone = Zone(plan.model, layers, input_shape=plan.data.shape, training=plan.training, seed=seed)

    def take(self, head: TensorHead, tensor: Tensor, channel: Channel) -> None:
        """One tensor of a step. Two-way: the IR, then labels. Ternary: the IR, then the HeadNet's gradient."""
        epoch, step, ternary = head.epoch, head.step, self._plan.partition.head > 0
        match head.role:
            case "ir":
                out = self._zone.forward(tensor, epoch=epoch, step=step, needs_input_grad=True)
                if ternary:
                    self._send(channel, out, "center-out", head)
            case "labels" if not ternary:
                grad, loss = self._zone.backward_from_labels(tensor, epoch=epoch, step=step, steps=self._steps)
                if grad is not None:
                    self._send(channel, torch.tensor([loss]), "loss", head)
                self._send(channel, grad, "ir-grad", head)
            case "center-grad" if ternary:
                grad = self._zone.backward(tensor, epoch=epoch, step=step, steps=self._steps)
                self._send(channel, grad, "ir-grad", head)
            case role:
                raise refuse(f"{role} has no place in this run")

    def commitment(self) -> bytes:
        """Digest (32 bytes) of the present weights: what the host commits to after each epoch."""
        return to_raw(model_digest(self._plan.model, state_of(self._zone.module)))

    def weights(self) -> bytes:
        """The present weights as safetensors."""
        return encode_state(state_of(self._zone.module))

    @staticmethod
    def _send(channel: Channel, tensor: Tensor | None, role: Role, head: TensorHead) -> None:
        if tensor is None:
            raise refuse(f"{role} before its forward pass")
        channel.send_tensor(tensor, role=role, run=head.run, epoch=head.epoch, step=head.step)
