"""A cut that the operator asks for while a run goes on: kept until the next epoch begins, with what the parties say."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from caltrain.crypto.dsse import Envelope, open_envelope
from caltrain.errors import ConfigError, IntegrityError
from caltrain.plan import CutApproval, Plan, check_plan


@dataclass
class AskedCut:
    """`front` is what was asked for last, or None; `approvals` are for a shallower one, by party."""

    plan: Plan
    front: int | None = None
    approvals: dict[str, Envelope] = field(default_factory=dict)

    def ask(self, front: int, *, epoch: int) -> None:
        """Ask for a FrontNet of so many layers.

        Raises ConfigError `cut.below-plan`, or that of a cut that the model does not allow; then the former stays.
        """
        least = self.plan.partition.front_at(epoch)
        if front < least:
            raise ConfigError(
                "cut.below-plan",
                f"the plan has {least} layers in the FrontNet by epoch {epoch}, {front} were asked for",
                step="ask for a cut",
                fix=f"Ask for at least {least}.",
            )
        # As for a plan that begins with it: what leaves in the end must fit through the door, too.
        check_plan(msgspec.structs.replace(self.plan, partition=self.plan.partition.at(front)))
        self.front = front
        self.approvals.clear()

    def agree(self, party: str, envelope: Envelope, *, run: str, head: str) -> None:
        """A party's word for the cut that is asked for. Raises IntegrityError `cut.not-this` unless it is that."""
        key = self.plan.party(party).public_key
        approval = open_envelope(envelope, "move-cut", key, CutApproval, step="agree to a cut")
        due = CutApproval(run=run, head=head, party=party, front=self.front) if self.front is not None else None
        if approval != due:
            raise IntegrityError(
                "cut.not-this",
                f"{party} agrees to another cut than the one that is asked for here and now",
                step="agree to a cut",
                fix="Agree once the run waits for it, to the cut that it names.",
            )
        self.approvals[party] = envelope

    def missing(self, present: int) -> set[str]:
        """Parties whose word the cut needs and has not."""
        if self.front is None or self.front >= present:
            return set()
        return {party.name for party in self.plan.parties} - self.approvals.keys()

    def done(self) -> None:
        """It has been made, or is there already."""
        self.front = None
        self.approvals.clear()
