"""Stages of a user's own, from a pure-Python wheel whose SHA-256 the plan names.

What this needs of trust: every party approves the wheel's digest with the plan, and so has read its code or trusts who
wrote it. The code runs inside the enclave, in the same process as keys and records. Nothing here confines it; the
enclave's lock does, as it confines the rest (no files, no network), but not from what the host is sent anyway. The
checks below keep a mistake from passing unseen, and make sure that what runs is what could be read.

The wheel is neither installed nor written: its modules are imported from memory (`models.importer`), under their own
names. What the code imports besides must be installed where it runs: for the enclave that is what is measured.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from caltrain.crypto.digests import same, to_text
from caltrain.errors import ConfigError, IntegrityError
from caltrain.models.archive import read_sources
from caltrain.models.importer import MemoryModules
from caltrain.models.layers import Shape, Stage, refuse
from caltrain.models.spec import MAX_WHEEL_BYTES, ModelSpec, Wheel

Factory = Callable[[Stage], nn.Module]


def no_wheel(stage: Stage) -> nn.Module:
    """Stands where no wheel was given. Raises ConfigError `model.no-wheel`."""
    raise refuse(
        "model.no-wheel", f"stage {stage.name!r} needs the plan's wheel", "Give the wheel that the plan names."
    )


def stages_of(raw: bytes | None, spec: ModelSpec) -> Factory:
    """Makes the model's stages from the wheel that it names, where that was given. Raises as `load_wheel` does."""
    return load_wheel(raw, spec.wheel) if raw is not None and spec.wheel else no_wheel


def load_wheel(raw: bytes, wheel: Wheel) -> Factory:
    """The wheel's factory, which is called with a stage's name and gives its module; the weights are drawn later.

    `wheel.sha256` is the plain SHA-256 of the file's bytes, as `sha256sum` prints it. Imports and factory run with
    torch's generator seeded with 0, and it is as before afterwards.

    Raises IntegrityError `wheel.too-large` or `wheel.other-digest`, before anything is read from the archive; then
    ConfigError `wheel.archive`, `wheel.not-pure`, `wheel.name-taken` (a top-level name that this process could import
    without the wheel), `wheel.no-factory`, `wheel.import` (a module that is not there or cannot be read, by name) or
    `wheel.failed` (whatever else the wheel's code raises). The factory raises the last two, and `wheel.stage`.
    """
    if len(raw) > MAX_WHEEL_BYTES:
        raise _not_it("wheel.too-large", f"the wheel has {len(raw)} bytes, more than {MAX_WHEEL_BYTES}")
    found = to_text(hashlib.sha256(raw).digest())
    if not same(found, wheel.sha256):
        raise _not_it("wheel.other-digest", f"the wheel is {found}, the plan names {wheel.sha256}")
    modules = MemoryModules(read_sources(raw))
    modules.check_names()
    module, _, name = wheel.factory.partition(":")
    if module not in modules.paths:
        raise _refused("wheel.no-factory", f"the wheel has no module {module}")
    with modules.importable(), _named_errors(f"importing {module}"):
        make = getattr(importlib.import_module(module), name, None)
    if not callable(make):
        raise _refused("wheel.no-factory", f"module {module} has no function {name}")

    def factory(stage: Stage) -> nn.Module:
        with modules.importable(), _named_errors(f"making stage {stage.name!r}"):
            made: object = make(stage.name)
            fault = _fault(made, stage)
        if fault:
            raise _misfit(stage, fault)
        return cast(nn.Module, made)

    return factory


def check_stage(module: nn.Module, stage: Stage, input_shape: Shape) -> nn.Module:
    """`module`, once two records of zeros have gone through a copy of it as the stage says: (2, ...) float32.

    Call it with dropouts keyed. Raises ConfigError `wheel.stage` where the shape differs or the input is overwritten
    (another layer may read it), `wheel.draws` where training draws from torch's running stream, and `wheel.import` or
    `wheel.failed` where the code fails.
    """
    x = torch.zeros(2, *input_shape)
    with _named_errors(f"running stage {stage.name!r}"), torch.no_grad():
        trial = copy.deepcopy(module)
        out = trial.eval()(x)
        before = torch.get_rng_state()
        trial.train()(x)
        drew = not torch.equal(before, torch.get_rng_state())
    if not isinstance(out, Tensor) or out.dtype != torch.float32 or out.shape != (2, *stage.shape):
        given = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
        raise _misfit(stage, f"gives {given} for (2, {', '.join(map(str, input_shape))})")
    if x._version:
        raise _misfit(stage, "overwrites its input")
    if drew:
        raise _refused(
            "wheel.draws",
            f"stage {stage.name!r} draws random numbers when it trains, other than by nn.Dropout",
            "Use nn.Dropout, which is keyed by epoch and step: else split and plain training would differ.",
        )
    return module


@contextmanager
def _named_errors(doing: str) -> Iterator[None]:
    """What the wheel's code raises, in a line; its draws are its own."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            yield
        except ImportError as error:
            raise _refused(
                "wheel.import",
                f"{doing}: module {error.name or '?'!r} is not there, or cannot be read: {_line(error)}",
                "Import only what is installed with caltrain; in the enclave nothing else can be read.",
            ) from error
        except (Exception, SystemExit) as error:  # code of a user's may raise anything
            raise _refused("wheel.failed", f"{doing}: {_line(error)}", "Correct the wheel's code.") from error


def _line(error: BaseException) -> str:
    """The error's type and text, as far as it is one printable line of 300 characters."""
    text = next(line for line in traceback.format_exception_only(error) if line[:1] != " ")
    return "".join(c for c in text.partition("\n")[0][:300] if c.isprintable())


def _fault(made: object, stage: Stage) -> str:
    if not isinstance(made, nn.Module):
        return f"is made as {type(made).__name__}, not as a torch module"
    weights = sum(parameter.numel() for parameter in made.parameters())
    if weights != stage.weights:
        return f"has {weights} weights, the plan says {stage.weights}"
    for name, parameter in made.named_parameters():
        if parameter.dtype != torch.float32:
            return f"has weights {name} of {parameter.dtype}, not float32"
    for name, value in made.state_dict().items():
        if not value.is_meta and not bool(torch.isfinite(value).all()):
            return f"has {name} that is not finite"
    return ""


def _misfit(stage: Stage, what: str) -> ConfigError:
    return _refused("wheel.stage", f"stage {stage.name!r} {what}", "Let the plan say what the wheel's module is.")


def _refused(code: str, what: str, fix: str = "Correct [model.wheel] in the plan.") -> ConfigError:
    return ConfigError(code, what, step="load wheel", fix=fix)


def _not_it(code: str, what: str) -> IntegrityError:
    return IntegrityError(
        code, what, step="load wheel", fix="Get the wheel again: it must be the one that was approved."
    )
