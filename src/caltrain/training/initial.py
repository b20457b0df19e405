"""Public weights to start from: fine-tuning, as with the VGG-Face network of arXiv:1812.03230 (section VI).

They come as a safetensors file whose SHA-256 the plan names. Whoever has the file has the FrontNet's first weights, and
all of a frozen one: a run that starts so has no secret FrontNet.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from caltrain.crypto.digests import same, to_text
from caltrain.errors import ConfigError, IntegrityError
from caltrain.models.network import Network
from caltrain.models.spec import MAX_WEIGHTS, ModelSpec, embedding_layer
from caltrain.models.weights import State, check_state, decode_state
from caltrain.training.spec import InitialWeights, TrainingSpec

MAX_INITIAL_BYTES = 4 * MAX_WEIGHTS + (64 << 20)
_STEP = "load initial weights"


def load_initial(raw: bytes, initial: InitialWeights) -> State:
    """The tensors of the file, by name. `initial.sha256` is the plain SHA-256 of its bytes, as `sha256sum` prints it.

    Raises IntegrityError `initial.too-large`, `initial.other-digest` or `weights.malformed`.
    """
    if len(raw) > MAX_INITIAL_BYTES:
        raise _not_it("initial.too-large", f"the file has {len(raw)} bytes, more than {MAX_INITIAL_BYTES}")
    found = to_text(hashlib.sha256(raw).digest())
    if not same(found, initial.sha256):
        raise _not_it("initial.other-digest", f"the initial weights are {found}, the plan names {initial.sha256}")
    return decode_state(raw, step=_STEP)


def check_given(training: TrainingSpec, state: State | None) -> None:
    """Raise ConfigError `initial.missing` unless weights are there exactly if the plan names some."""
    if (training.initial is None) != (state is None):
        raise _unfit("initial.missing", "initial weights are named and not given, or given and not named")


def start_from(module: Network, state: State, spec: ModelSpec, *, frozen: int = 0) -> None:
    """Copy into a zone, or a whole model, those tensors of `state` that are its own; the rest stays as drawn.

    Names are those of the whole model: number of the layer, then the name within it. Layers below `frozen` must be all
    there. Raises ConfigError `initial.no-layers` (no tensors at all), `initial.frozen-missing` or
    `initial.unknown-layers` (a name that the model does not have, maybe a misspelt one: leave out what is not wanted),
    IntegrityError `weights.malformed` (shape, type, not finite). After an error nothing is copied.
    """
    if not state:
        raise _unfit("initial.no-layers", "the file holds no tensors")
    own, everywhere = module.state_dict(), {str(number) for number in range(len(spec.layers))}
    here = {str(number) for number in module.part}
    mine = {name: value for name, value in state.items() if name.partition(".")[0] in here}
    unknown = [name for name in state if name.partition(".")[0] not in everywhere] + [n for n in mine if n not in own]
    if unknown:
        raise _unfit("initial.unknown-layers", f"the model has no {', '.join(map(repr, sorted(unknown)[:4]))}"[:400])
    bare = [name for name in own if int(name.partition(".")[0]) < frozen and name not in mine]
    if bare:
        raise _unfit("initial.frozen-missing", f"{bare[0]} is frozen and not in the file: it would stay random")
    check_state({name: own[name] for name in mine}, mine, step=_STEP)
    with torch.no_grad():
        for name, value in mine.items():
            own[name].copy_(value)


def frozen_layers(spec: ModelSpec, training: TrainingSpec) -> int:
    """How many layers, from the input, are kept as they are. Raises ConfigError `initial.all-frozen`."""
    frozen = 0 if training.initial is None else training.initial.frozen
    if frozen > embedding_layer(spec):
        raise _unfit("initial.all-frozen", f"with {frozen} frozen layers no layer with weights is left to train")
    return frozen


def freeze(module: Network, frozen: int) -> None:
    """Let layers below `frozen` learn nothing: no gradient, so no step or decay, and statistics as they are."""
    for number, block in zip(module.part, module.children(), strict=True):
        if number < frozen:
            block.requires_grad_(requires_grad=False)
            # Whatever mode the model is put into, this block runs in the mode of inference.
            block.register_forward_pre_hook(_infer)


def _infer(block: nn.Module, _inputs: object) -> None:
    block.eval()


def _unfit(code: str, what: str) -> ConfigError:
    return ConfigError(
        code, what, step=_STEP, fix="Correct [training.initial], or the names in the file that it names."
    )


def _not_it(code: str, what: str) -> IntegrityError:
    return IntegrityError(code, what, step=_STEP, fix="Get the file again: it must be the one that the plan names.")
