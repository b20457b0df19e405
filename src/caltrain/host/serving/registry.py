"""Which models are served, in which versions. A folder that gets another package is taken up beside the old one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from caltrain.errors import CaltrainError, ConfigError
from caltrain.host.serving import faults
from caltrain.host.serving.model import ServedModel, within
from caltrain.serving.folder import PackageFolder, open_folder

OnReady = Callable[[ServedModel], None]
Make = Callable[[PackageFolder, OnReady], ServedModel]
_log = logging.getLogger(__name__)


class Registry:
    """Models by name and version (the package's revision). Used in one event loop; `make` starts a model's service."""

    def __init__(self, folders: Sequence[Path], make: Make) -> None:
        self._folders, self._make = tuple(folders), make
        self._models: dict[str, dict[int, ServedModel]] = {}
        self._newest: dict[Path, ServedModel] = {}
        self._replaces: dict[ServedModel, list[ServedModel]] = {}
        self.draining, self._under_way, self._idle = False, 0, asyncio.Event()
        self._loading = asyncio.Lock()

    # -- who is asked ----------------------------------------------------------------------------------------------

    def versions(self, name: str) -> list[ServedModel]:
        """What is served under a name, oldest revision first. Raises AccessError `model.unknown`."""
        if name not in self._models:
            raise faults.model_unknown("no model of that name is served here")
        return [model for _, model in sorted(self._models[name].items())]

    def find(self, name: str, version: str | None = None, *, session: str | None = None) -> ServedModel:
        """That version; else the one that has the session; else the newest that is ready; else the newest.

        Raises AccessError `model.unknown`.
        """
        served = self.versions(name)
        if version is not None:
            found = [model for model in served if str(model.version) == version]
            if not found:
                raise faults.model_unknown("the model is not served in that version")
            return found[0]
        if session is not None:
            for model in served:
                if session in model.sessions:
                    return model
        return next((model for model in reversed(served) if model.phase == "ready"), served[-1])

    def to_grant(self, name: str, version: str | None = None) -> ServedModel:
        """That version; else the newest that waits for its key; else as `find`."""
        if version is None:
            waiting = [model for model in self.versions(name) if model.phase == "waiting-for-key"]
            if waiting:
                return waiting[-1]
        return self.find(name, version)

    def check_ready(self) -> None:
        """Raise EnvironmentFault `serving.*` unless every model has a version that takes new sessions."""
        if self.draining:
            raise faults.draining()
        if not self._models:
            raise faults.starting()
        for name in self._models:
            self.find(name).check_open()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Something under way that a drain waits for. Raises EnvironmentFault `serving.draining`."""
        if self.draining:
            raise faults.draining()
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            if self.draining and not self._under_way:
                self._idle.set()

    # -- life ------------------------------------------------------------------------------------------------------

    async def load(self, path: Path) -> ServedModel:
        """Serve what lies in a folder, beside what it held before, which drains once the new one has its key.

        A folder whose package has not changed goes on as it is. Raises what `open_folder` does, and ConfigError
        `package.same-revision`.
        """
        async with self._loading:
            return self._taken_up(path, await asyncio.to_thread(open_folder, path))

    def _taken_up(self, path: Path, folder: PackageFolder) -> ServedModel:
        before = self._newest.get(path)
        if before is not None and before.package.digest() == folder.package.digest():
            return before
        terms = folder.package.terms
        if terms.revision in self._models.get(terms.name, {}):
            raise same_revision(terms.name, terms.revision)
        model = self._make(folder, self._on_ready)
        model.life.add_done_callback(lambda _: self._gone(model))
        self._models.setdefault(terms.name, {})[terms.revision] = model
        self._newest[path] = model
        if before is not None:
            self._replaces[model] = [before, *self._replaces.pop(before, [])]
        return model

    async def reload(self) -> list[CaltrainError]:
        """Look at every folder again. What cannot be taken up is logged and returned, and changes nothing."""
        failed = []
        for path in self._folders:
            try:
                await self.load(path)
            except CaltrainError as error:
                _log.warning("the package in %s was not taken up: %s", path, error)
                failed.append(error)
        return failed

    async def drain(self, seconds: float) -> None:
        """Begin nothing new, and wait for what is under way, so long at most."""
        self.draining = True
        if self._under_way:
            await within(self._idle.wait(), seconds)

    async def stop(self) -> None:
        """End every enclave."""
        self.draining = True
        models = [model for served in self._models.values() for model in served.values()]
        await asyncio.gather(*(model.stop() for model in models))

    def _on_ready(self, model: ServedModel) -> None:
        for old in self._replaces.pop(model, []):
            old.drain()

    def _gone(self, model: ServedModel) -> None:
        served = self._models.get(model.name, {})
        if served.get(model.version) is model:
            del served[model.version]
        if not served:
            self._models.pop(model.name, None)
        self._replaces.pop(model, None)


def same_revision(name: str, revision: int) -> ConfigError:
    """Two packages would have one name and version."""
    return ConfigError(
        "package.same-revision",
        f"another package of {name} revision {revision} is served already",
        step="load package",
        fix="Package it with a higher --revision.",
    )
