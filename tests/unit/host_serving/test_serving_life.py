"""The life of a served model: crashes, restarts, other packages in its folder, draining, the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from caltrain.boundary.channel import Tensors
from caltrain.boundary.serving import Served
from caltrain.errors import AccessError, ConfigError, EnvironmentFault, IntegrityError
from caltrain.host.serving import model as model_module
from caltrain.host.serving.center import ServedCenter
from caltrain.host.serving.enclave import OnComputed
from caltrain.host.serving.faults import Outcome
from caltrain.host.serving.launch import Launcher
from caltrain.host.serving.server import check_packages
from caltrain.host.serving.sessions import IDLE_SECONDS, MOST, MOST_OF_USER, Sessions
from caltrain.serving.folder import open_folder
from caltrain.serving.session import SessionRequest
from support.samples import refused
from support.served import User
from support.serving_host import Host, error_of, hosted, pictures, real_launch, sealed_of, tiny_folder

Play = Callable[[Host], Awaitable[None]]


def played(play: Play, *folders: Path, **options: object) -> None:
    """Run a test against a host that serves these."""

    async def body() -> None:
        async with asyncio.timeout(60), hosted(*map(open_folder, folders), **options) as host:  # type: ignore[arg-type]
            await play(host)

    asyncio.run(body())


@pytest.fixture(name="one")
def _one(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "one", head=2, budget=100).folder


async def asked(host: Host) -> bool:
    """Whether a new session gets its answer."""
    una = await host.session("una")
    return una.table(sealed_of(await host.infer(una.seal(pictures(2))))).shape == (2, 3)


def test_a_crashed_enclave_is_started_anew_and_needs_the_owner_and_new_sessions(one: Path) -> None:
    async def play(host: Host) -> None:
        await host.grant()
        for crash in range(3):
            una = await host.session("una")
            sealed_of(await host.infer(una.seal(pictures(1))))
            host.launch.kill()
            async with asyncio.timeout(20):
                while host.model.phase == "ready":
                    await asyncio.sleep(0.001)
            status, code = error_of(await host.infer(una.seal(pictures(1))))
            assert (status, code in {"serving.starting", "serving.no-key"}) == (503, True), code
            await host.grant()
            assert len(host.launch.programs) == crash + 2
            assert error_of(await host.infer(una.seal(pictures(1)))) == (409, "session.unknown")
            assert await asked(host)
        assert 'restarts_total{model="tiny",version="1"} 3.0' in host.metrics.page().decode()

    played(play, one)


def test_under_load_with_a_killed_enclave_each_request_is_answered_rightly_once_or_told_to_come_back(
    tmp_path: Path,
) -> None:
    one = tiny_folder(tmp_path / "one", head=2, budget=10_000, rows=16, fixed=True).folder
    rows = pictures(8, seed=3)
    right: dict[int, Any] = {}
    told: set[str] = set()

    async def opened(host: Host) -> User:
        while True:
            await host.until("ready")
            with contextlib.suppress(AssertionError):  # killed meanwhile
                return await host.session("una")

    async def client(host: Host, number: int) -> int:
        answered, user = 0, await opened(host)
        while answered < 25:
            got = await host.infer(user.seal(rows[number : number + 1], lane=number))
            if got.status_code == 200:
                table = user.table(sealed_of(got), lane=number)
                assert torch.equal(table, right.setdefault(number, table))
                answered += 1
                continue
            status, code = error_of(got)
            told.add(code)
            assert status in {409, 503}, code
            if code == "session.unknown":
                user = await opened(host)
            await asyncio.sleep(0.005)
        return answered

    async def play(host: Host) -> None:
        await host.grant()
        clients = [asyncio.create_task(client(host, number)) for number in range(8)]
        for _ in range(2):
            await asyncio.sleep(0.15)
            host.launch.kill()
            await host.grant()
        assert await asyncio.gather(*clients) == [25] * 8
        assert host.model.batcher.idle
        assert host.model.batcher.rows == 0

    played(play, one)
    assert "session.unknown" in told
    assert told <= {"session.unknown", "serving.restarted", "serving.starting", "serving.no-key"}


class SaysNothing:
    """An enclave, and what launches it, that answers everything with nothing."""

    def __call__(self, on_lost: Callable[[], None]) -> SaysNothing:
        """See `Launch`."""
        del on_lost
        return self

    def ask(self, message: object) -> Future[Served]:
        """Success, without what was asked for."""
        del message
        answer: Future[Served] = Future()
        answer.set_result(Served())
        return answer

    def infer(self, requests: list[bytes]) -> Future[list[Outcome]]:
        """Never called."""
        raise AssertionError(requests)

    def stop(self) -> None:
        """It has ended."""

    def close(self) -> None:
        """See `Launch`."""


def test_an_enclave_that_answers_no_question_is_not_waited_for_longer_than_a_minute(
    one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "ANSWER_SECONDS", 0.01)

    class Silent(SaysNothing):
        def ask(self, message: object) -> Future[Served]:
            del message
            return Future()

    async def play(host: Host) -> None:
        await host.until("waiting-for-key")
        with refused(EnvironmentFault, "serving.too-slow"):
            await host.model.attest("0" * 64)

    played(play, one, launch=lambda _: Silent())


def test_an_enclave_that_leaves_out_what_was_asked_for_is_as_good_as_gone(one: Path) -> None:
    async def play(host: Host) -> None:
        await host.until("waiting-for-key")
        model, envelope = host.model, host.model.envelope
        with refused(EnvironmentFault, "serving.restarted"):
            await model.attest("0" * 64)
        with refused(EnvironmentFault, "serving.restarted"):
            await model.grant(envelope)
        assert model.phase == "waiting-for-key"
        model.phase = "ready"
        with refused(EnvironmentFault, "serving.restarted"):
            await model.open_session(SessionRequest(envelope=envelope))
        assert len(model.sessions) == 0

    played(play, one, launch=lambda _: SaysNothing())


class Waits:
    """A center that computes nothing until the test ends."""

    def __init__(self) -> None:
        self.got = 0

    def submit(self, tensors: Tensors, then: OnComputed) -> None:
        """Keep it for ever."""
        self.got += 1


def test_requests_under_way_and_in_the_queue_are_told_of_the_crash(one: Path) -> None:
    center = Waits()

    async def play(host: Host) -> None:
        await host.grant()
        una = await host.session("una")
        tasks = [asyncio.create_task(host.infer(una.seal(pictures(4, seed=lane), lane=lane))) for lane in range(4)]
        async with asyncio.timeout(20):
            while not (center.got == 2 and host.model.batcher.rows == 8):
                await asyncio.sleep(0.001)
        host.launch.kill()
        for got in await asyncio.gather(*tasks):
            assert error_of(got) == (503, "serving.restarted")
            assert got.headers["retry-after"] == "2"

    played(play, one, launch=lambda folder: real_launch(folder, center=center))


def test_an_enclave_that_does_not_start_is_tried_again(one: Path) -> None:
    def launch(folder: object) -> object:
        made = real_launch(folder)  # type: ignore[arg-type]
        made.fails = 2
        return made

    async def play(host: Host) -> None:
        for place in ("/v2/health/ready", f"/attestation?nonce={'ab' * 32}&model=tiny"):
            got = await host.client.get(place)
            assert error_of(got) == (503, "serving.starting")
        await host.grant()
        assert await asked(host)

    played(play, one, launch=launch)


def test_another_package_in_the_folder_is_taken_up_beside_the_old_one_without_a_lost_request(
    one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "IDLE_SECONDS", 0.3)

    async def play(host: Host) -> None:
        await host.grant()
        old, una = host.model, await host.session("una")
        assert await host.registry.reload() == []
        assert host.registry.versions("tiny") == [old], "nothing changed"
        tiny_folder(one, head=1, budget=100, revision=2)
        assert await host.registry.reload() == []
        new = host.model
        assert (new.version, old.phase) == (2, "ready")
        assert await asked(host), "the old one takes sessions until the new one has its key"
        await host.grant(new)
        assert old.phase == "draining"
        una.table(sealed_of(await host.infer(una.seal(pictures(1)))))
        fresh = await host.session("una")
        assert fresh.opened.session in new.sessions
        una.table(sealed_of(await host.infer(una.seal(pictures(1)))))
        status, code = error_of(await host.infer(una.seal(pictures(1)), place="/v2/models/tiny/versions/2"))
        assert (status, code) == (409, "session.unknown")
        got = await host.client.get("/v2/models/tiny/versions/1/ready")
        assert error_of(got) == (503, "serving.draining")
        await old.life
        await asyncio.sleep(0)
        assert host.registry.versions("tiny") == [new]
        assert error_of(await host.infer(una.seal(pictures(1)))) == (409, "session.unknown")
        got = await host.infer(una.seal(pictures(1)), place="/v2/models/tiny/versions/1")
        assert error_of(got) == (404, "model.unknown")
        fresh.table(sealed_of(await host.infer(fresh.seal(pictures(1)))))

    played(play, one)


def test_a_folder_that_cannot_be_taken_up_leaves_the_old_package_in_service(one: Path) -> None:
    async def play(host: Host) -> None:
        await host.grant()
        inside = (one / "inside.sealed").read_bytes()
        (one / "inside.sealed").write_bytes(inside[:-1])
        assert [error.code for error in await host.registry.reload()] == ["package.other-part"]
        (one / "inside.sealed").write_bytes(inside)
        (one / "package.json").unlink()
        assert [error.code for error in await host.registry.reload()] == ["file.unreadable"]
        tiny_folder(one, head=2, budget=7)
        assert [error.code for error in await host.registry.reload()] == ["package.same-revision"]
        assert await asked(host)

    played(play, one)


def test_two_versions_in_two_folders_are_served_side_by_side(one: Path, tmp_path: Path) -> None:
    two = tiny_folder(tmp_path / "two", head=1, budget=100, revision=2).folder

    async def play(host: Host) -> None:
        for model in host.registry.versions("tiny"):
            await host.grant(model)
        assert [model.phase for model in host.registry.versions("tiny")] == ["ready", "ready"]
        for version in ("1", "2"):
            una = await host.session("una", version=version)
            for place in ("/v2/models/tiny", f"/v2/models/tiny/versions/{version}"):
                reply = await host.infer(una.seal(pictures(1)), place=place)
                una.table(sealed_of(reply))
                assert f'"model_version":"{version}"'.encode() in reply.content

    played(play, one, two)


def test_a_drain_ends_what_is_under_way_and_begins_nothing_new(one: Path) -> None:
    async def play(host: Host) -> None:
        await host.grant()
        una = await host.session("una")
        tasks = [asyncio.create_task(host.infer(una.seal(pictures(1), lane=lane))) for lane in range(8)]
        while not host.registry._under_way:
            await asyncio.sleep(0)
        await host.registry.drain(20)
        outcomes = await asyncio.gather(*tasks)
        done = [una.table(sealed_of(got), lane=lane) for lane, got in enumerate(outcomes) if got.status_code == 200]
        assert done
        assert {error_of(got) for got in outcomes if got.status_code != 200} <= {(503, "serving.draining")}
        for got in (await host.infer(una.seal(pictures(1))), await host.client.get("/v2/health/ready")):
            assert error_of(got) == (503, "serving.draining")
            assert "retry-after" in got.headers
        await host.registry.stop()
        assert host.launch.closed
        with refused(AccessError, "model.unknown"):
            host.registry.versions("tiny")

    played(play, one)


def test_two_folders_with_one_version_are_refused_before_anything_is_launched(one: Path, tmp_path: Path) -> None:
    check_packages([one])
    other = tiny_folder(tmp_path / "other", budget=5).folder
    with refused(ConfigError, "package.same-revision"):
        check_packages([one, other])
    with refused(ConfigError, "file.unreadable"):
        check_packages([tmp_path / "none"])


def test_a_wrong_center_and_a_failing_one_are_named_and_the_service_goes_on(one: Path) -> None:
    folder = open_folder(one)
    center = ServedCenter(folder.package, folder.center(), threads=1)
    honest = center.compute
    wrong: list[tuple[str, Callable[[Tensors], Any]]] = [
        ("center.failed", lambda _: 1 / 0),
        ("center.malformed", lambda ir: tuple(x[:, :-1] for x in honest(ir))),
        ("center.malformed", lambda ir: tuple(x * torch.nan for x in honest(ir))),
        ("serving.restarted", lambda _: ()),
    ]

    async def play(host: Host) -> None:
        await host.grant()
        una = await host.session("una")
        for code, compute in wrong:
            una.table(sealed_of(await host.infer(una.seal(pictures(1)))))
            setattr(center, "compute", compute)  # noqa: B010
            got = await host.infer(una.seal(pictures(1)))
            assert error_of(got)[0] == 503
            assert error_of(got)[1] == code
            setattr(center, "compute", honest)  # noqa: B010

    played(play, one, launch=lambda folder: real_launch(folder, center=center))


def test_weights_that_do_not_fit_are_refused(one: Path) -> None:
    folder = open_folder(one)
    with refused(IntegrityError, "weights.malformed"):
        ServedCenter(folder.package, folder.center()[:-4], threads=1)


def test_a_program_that_is_no_enclave_is_named(one: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from caltrain.host import launcher
    from caltrain.host.confine import Confinement

    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(launcher, "find_bubblewrap", lambda: Confinement(None, "not in this test"))
    with (tmp_path / "log").open("wb") as log:
        made = Launcher(open_folder(one), root_secret=bytes(32), threads=1, log=log.fileno())
        with refused(EnvironmentFault, "enclave.did-not-start"):
            made(lambda: None)
        made.close()


def test_sessions_that_are_idle_are_closed_when_another_opens() -> None:
    now = [0.0]
    sessions = Sessions(lambda: now[0])
    assert sessions.last_used == float("-inf")
    assert sessions.opened("a", "una") == []
    now[0] = 5.0
    assert sessions.opened("b", "una") == []
    assert sessions.last_used == 5.0
    with sessions.request("a", 1, most_rows=9):
        now[0] = 2 * IDLE_SECONDS
        assert sessions.last_used == now[0]
        assert sessions.opened("c", "una") == ["b"], "one with a request under way is not idle"
    for number in range(MOST - 2):
        assert sessions.opened(str(number), str(number)) == []
    now[0] += 1
    assert (len(sessions), len(sessions.opened("more", "more"))) == (MOST, 1)


def test_a_user_who_opens_too_many_sessions_loses_their_own() -> None:
    sessions = Sessions(lambda: 0.0)
    sessions.opened("pats", "pat")
    for number in range(MOST_OF_USER):
        assert sessions.opened(str(number), "una") == []
    with sessions.request("0", 1, most_rows=9):
        assert sessions.opened("more", "una") == ["1"], "one with a request under way stays"
    assert "pats" in sessions
    assert len(sessions) == MOST_OF_USER + 1


def test_a_user_has_a_share_of_the_queue_over_all_sessions_and_no_more() -> None:
    sessions = Sessions(lambda: 0.0)
    for name, user in (("one", "una"), ("two", "una"), ("other", "pat")):
        sessions.opened(name, user)
    with sessions.request("one", 4, most_rows=8), sessions.request("two", 4, most_rows=8):
        with refused(AccessError, "session.busy"), sessions.request("one", 1, most_rows=8):
            pass
        with sessions.request("other", 8, most_rows=8):
            pass
    with sessions.request("one", 8, most_rows=8):
        pass
