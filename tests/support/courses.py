"""One party through several runs in memory: its folder as `caltrain party join` would leave it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from caltrain.enclave.run import State
from caltrain.participant.identity import Identity
from caltrain.participant.journal import KeptRun, keep_run
from caltrain.participant.receive import receive, run_folder
from caltrain.plan import Plan
from support.folders import identity_of
from support.repairs import Place, leave_out, quarantine_of
from support.scripted_host import ScriptedHost
from support.world import World

Change = Callable[[Plan], Plan]


def shared(plan: Plan) -> Plan:
    """Every party is told every share."""
    return msgspec.structs.replace(plan, trace=msgspec.structs.replace(plan.trace, share_quality=True))


class Course:
    """Alpha, and its runs with the same others: `again` adds one."""

    def __init__(self, folder: Path, change: Change = shared) -> None:
        self.worlds = [World(epochs=1, change=change)]
        self.alpha: Identity = identity_of(self.worlds[0].parties["alpha"], folder)
        keys = {"signing_key": self.alpha.signer.private_bytes(), "data_key": self.alpha.data_key}
        (folder / "identity.json").write_bytes(msgspec.json.encode(self.alpha.public))
        (folder / "secrets.json").write_bytes(msgspec.json.encode(keys))
        self._finish(self.worlds[0])

    def again(self, change: Change = lambda plan: plan, *, without: tuple[Place, ...] = (), shards: int = 2) -> World:
        """Another run of the same parties and the first plan, but for `change`; with records left out a repair.

        Alpha takes part with so many of its shards.
        """
        first, world = self.worlds[0], World(epochs=1)
        world.parties, world.users, world.plan = dict(first.parties), first.users, change(first.plan)
        alpha = world.parties["alpha"]
        world.parties["alpha"] = replace(alpha, shards=alpha.shards[:shards])
        if without:
            leave_out(world, quarantine_of(world, without))
        self._finish(world)
        self.worlds.append(world)
        return world

    def folder(self, number: int) -> Path:
        """Where alpha keeps its run of that number, from 0."""
        return run_folder(self.alpha, self.worlds[number].manifest.run)

    def _finish(self, world: World) -> None:
        world.run_to(State.LINKED)
        run, manifest = world.manifest.run, world.manifest
        kept = KeptRun(
            plan=manifest.plan,
            manifest=manifest.digest(),
            signing_key=manifest.enclave_signing_key,
            head=world.run.chain.head,
            events=len(world.events),
        )
        keep_run(self.alpha.folder, run, kept)
        with ScriptedHost(world).client() as client:
            receive(client, world.plan, self.alpha, manifest)
