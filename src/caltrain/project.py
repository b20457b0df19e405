"""A project folder for one machine: plan, policy, and everybody's keys.

plan.toml  policy.toml  operator/  parties/NAME/  users/NAME/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from caltrain.attestation.measurement import measure_enclave
from caltrain.attestation.verify import Policy
from caltrain.errors import ConfigError
from caltrain.participant.identity import Identity, create_identity
from caltrain.plan import EnclaveSpec, Party, Plan, ReleaseSpec, Right, User, check_plan
from caltrain.presets import PRESETS, Preset

DEFAULT_PARTIES = ["alder", "birch", "cedar", "dogwood"]
_RIGHTS: tuple[Right, Right] = ("predict", "trace")


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
    preset: str,
    parties: Sequence[str],
    users: Sequence[str],
    two_way: bool = False,
    reveal_seed: bool = False,
    budget: int = 1000,
) -> Project:
    """Make a project from a preset. Raises ConfigError `project.exists`, `project.unknown-preset`."""
    if folder.exists():
        raise ConfigError(
            "project.exists", f"{folder} exists already", step="new project", fix="Choose a folder that does not exist."
        )
    chosen = find_preset(preset)
    folder.mkdir(parents=True)
    operator = create_identity(folder / "operator", "operator")
    own = {name: create_identity(folder / "parties" / name, name) for name in parties}
    asking = {name: create_identity(folder / "users" / name, name) for name in users}
    measurement = measure_enclave()
    plan = check_plan(
        Plan(
            version=1,
            name=f"{preset} with {len(own)} parties",
            model=chosen.model,
            partition=msgspec.structs.replace(chosen.partition, head=0) if two_way else chosen.partition,
            data=chosen.data,
            training=chosen.training,
            parties=tuple(Party(name=i.name, public_key=i.signer.public) for i in own.values()),
            users=tuple(
                User(name=i.name, public_key=i.signer.public, may=_RIGHTS, budget=budget) for i in asking.values()
            ),
            enclave=EnclaveSpec(measurement=measurement),
            release=ReleaseSpec(reveal_seed=reveal_seed),
        )
    )
    policy = Policy(measurements=(measurement,), allow_simulated=True, simulated_roots=(operator.signer.public,))
    project = Project(folder, plan, policy, operator, own, asking)
    project.plan_path.write_bytes(msgspec.toml.encode(plan))
    project.policy_path.write_bytes(msgspec.toml.encode(policy))
    return project


def find_preset(name: str) -> Preset:
    """A preset by name. Raises ConfigError."""
    if name not in PRESETS:
        raise ConfigError(
            "project.unknown-preset",
            f"no preset {name[:60]!r}",
            step="new project",
            fix=f"Known: {', '.join(PRESETS)}.",
        )
    return PRESETS[name]
