"""A project folder for one machine: plan, policy, and everybody's keys.

plan.toml  policy.toml  operator/  parties/NAME/  users/NAME/
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from caltrain.attestation.measurement import measure_enclave
from caltrain.attestation.verify import Policy
from caltrain.errors import ConfigError
from caltrain.files import write_whole
from caltrain.participant.identity import Identity, create_identity
from caltrain.plan import EnclaveSpec, Party, Plan, Reader, ReleaseSpec, Right, TraceSpec, User, check_plan
from caltrain.presets import STARTS, Preset, StartName

DEFAULT_PARTIES = ["alder", "birch", "cedar", "dogwood"]
_RIGHTS: tuple[Right, ...] = ("predict", "trace", "verdict")


@dataclass(frozen=True)
class Project:
    """What `create_project` made."""

    folder: Path
    plan: Plan
    policy: Policy
    operator: Identity
    parties: dict[str, Identity]
    users: dict[str, Identity]

    @property
    def plan_path(self) -> Path:
        """The plan as TOML."""
        return self.folder / "plan.toml"

    @property
    def policy_path(self) -> Path:
        """The attestation policy as TOML."""
        return self.folder / "policy.toml"


def create_project(
    folder: Path,
    *,
    preset: StartName | Preset,
    parties: Sequence[str],
    users: Sequence[str],
    two_way: bool = False,
    reveal_seed: bool = False,
    budget: int = 1000,
    epochs: int | None = None,
    title: str | None = None,
) -> Project:
    """Make a project from a preset (by name, or with a `title`), whole or not at all; `epochs` replaces the preset's.

    Raises ConfigError (`project.exists`, names that cannot be used), EnvironmentFault.
    """
    chosen = preset if isinstance(preset, Preset) else STARTS[preset]
    if epochs is not None:
        chosen = msgspec.structs.replace(chosen, training=msgspec.structs.replace(chosen.training, epochs=epochs))
    measurement = measure_enclave()
    with _new_folder(folder):
        operator = create_identity(folder / "operator", "operator")
        own = {name: create_identity(folder / "parties" / name, name) for name in parties}
        asking = {name: create_identity(folder / "users" / name, name) for name in users}
        plan = Plan(
            version=1,
            name=f"{title or preset} with {len(own)} parties",
            model=chosen.model,
            partition=msgspec.structs.replace(chosen.partition, head=0) if two_way else chosen.partition,
            data=chosen.data,
            training=chosen.training,
            parties=tuple(Party(name=i.name, public_key=i.signer.public) for i in own.values()),
            users=tuple(
                User(name=i.name, public_key=i.signer.public, may=_RIGHTS, budget=budget) for i in asking.values()
            ),
            enclave=EnclaveSpec(measurement=measurement),
            center=chosen.center,
            # Those who trace see the records that are disclosed to them, and nobody who carries them does.
            trace=TraceSpec(
                disclose_to=tuple(Reader(name=i.name, encryption_key=i.reading_key().public) for i in asking.values())
            ),
            release=ReleaseSpec(reveal_seed=reveal_seed),
        )
        policy = Policy(measurements=(measurement,), allow_simulated=True, simulated_roots=(operator.signer.public,))
        project = Project(folder, check_plan(plan), policy, operator, own, asking)
        write_whole(project.plan_path, to_toml(plan))
        write_whole(project.policy_path, to_toml(policy))
    return project


def to_toml(value: Plan | Policy) -> bytes:
    """A plan or policy as people read it."""
    return msgspec.toml.encode(_without_nothing(msgspec.to_builtins(value)))


def _without_nothing(value: object) -> object:
    """TOML has no null, and a key set to an empty list cannot be a table later on: an absent key says the same."""
    if isinstance(value, dict):
        return {key: _without_nothing(entry) for key, entry in value.items() if entry not in (None, [], ())}
    return [_without_nothing(entry) for entry in value] if isinstance(value, list | tuple) else value


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make a folder; on any failure, Ctrl-C included, nothing of it is left."""
    if folder.exists():
        raise ConfigError(
            "project.exists", f"{folder} exists already", step="new project", fix="Choose a folder that does not exist."
        )
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
