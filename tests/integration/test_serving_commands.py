"""A model is packaged, served, asked and proxied by the commands that people type, each a process of its own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import torch

from caltrain.attestation.measurement import measure_enclave
from caltrain.exposure.open_model import save_subject
from support.exposed import subject

pytestmark = pytest.mark.processes
SECONDS = 120
RECORDS = np.random.default_rng(0).integers(0, 256, (5, 1, 10, 10)).astype(np.uint8)


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "caltrain", *map(str, words), "--format", "json"]


def ran(*words: str | Path) -> dict[str, Any]:
    """What a command that succeeds prints."""
    done = subprocess.run(command(*words), capture_output=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def failed(*words: str | Path) -> str:
    """The code of the error that a command prints."""
    done = subprocess.run(command(*words), capture_output=True, timeout=SECONDS, check=False)
    assert done.returncode >= 10, done.stdout + done.stderr
    code: str = json.loads(done.stdout)["error"]["code"]
    return code


@contextmanager
def running(*words: str | Path) -> Iterator[tuple[dict[str, Any], subprocess.Popen[bytes]]]:
    """A command that serves until a signal, and the first line that it prints."""
    with subprocess.Popen(command(*words), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline()), process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=SECONDS)


@dataclass
class Scene:
    """Everybody's folders, and a host that serves."""

    folder: Path
    url: str
    owner: str
    policy: Path

    def asking(self, user: str = "una") -> tuple[str | Path, ...]:
        return ("--model", "tiny", "--owner", self.owner, "--home", self.folder / user, "--policy", self.policy)

    def grant(self) -> dict[str, Any]:
        home = ("--home", self.folder / "owner", "--policy", self.policy)
        return ran("model", "grant", self.url, self.folder / "package", *home)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("serving")
    keys = {
        name: ran("party", "keygen", name, "--home", folder / name)["public_key"]
        for name in ("owner", "una", "eve", "op")
    }
    save_subject(subject(), folder / "model")
    policy = folder / "policy.toml"
    policy.write_text(
        f'measurements = ["{measure_enclave()}"]\nallow_simulated = true\nsimulated_roots = ["{keys["op"]}"]\n'
    )
    ran(
        *(
            "model",
            "package",
            folder / "model",
            "--home",
            folder / "owner",
            "--name",
            "tiny",
            "--cut",
            "2",
            "--head",
            "1",
        ),
        *("--user", f"{folder / 'una' / 'identity.json'}:100", "--rows", "16", "--fixed", "--unassessed"),
        *("--audit", "1", "--out", folder / "package"),
    )
    np.save(folder / "records.npy", RECORDS)
    with ExitStack() as stack:
        said, _ = stack.enter_context(
            running("serve", folder / "package", "--root", folder / "op", "--port", "0", "--threads", "1")
        )
        assert said["simulated"] is True
        made = Scene(folder, said["url"], keys["owner"], policy)
        wait_for_enclave(made.url)
        granted = made.grant()
        assert (granted["measurement"], granted["simulated"]) == (measure_enclave(), True)
        yield made


def wait_for_enclave(url: str) -> None:
    """Until the enclave says that it waits for its key."""
    from support.processes import wait_until

    def waits() -> bool:
        body = httpx.get(f"{url}/v2/models/tiny/ready", trust_env=False, timeout=SECONDS)
        return body.status_code == 503 and body.json()["detail"]["code"] == "serving.no-key"

    wait_until(waits, seconds=SECONDS)


def expected() -> np.ndarray[Any, np.dtype[np.float32]]:
    """The model's own probabilities, in the batches that the host computes."""
    torch.set_num_threads(1)
    model, padded = subject(), torch.zeros((16, 1, 10, 10), dtype=torch.uint8)
    padded[: len(RECORDS)] = torch.from_numpy(RECORDS)
    with torch.inference_mode():
        found: np.ndarray[Any, np.dtype[np.float32]] = model.logits(model.pictures(padded)).softmax(1).numpy()
    return found[: len(RECORDS)]


def test_predict_gets_the_models_own_answers(scene: Scene) -> None:
    found = ran("predict", scene.url, scene.folder / "records.npy", *scene.asking())
    best = expected()
    assert found["predicted"] == [subject().data.classes[number] for number in best.argmax(1)]
    assert found["probability"] == pytest.approx(best.max(1).tolist(), abs=1e-5)
    assert (found["simulated"], found["center_audited"]) == (True, True)


def test_the_proxy_answers_plain_requests(scene: Scene) -> None:
    with running("proxy", scene.url, *scene.asking(), "--port", "0") as (said, _):
        assert said["simulated"] is True
        tensor = {"name": "input", "datatype": "UINT8", "shape": [4, 1, 10, 10], "data": RECORDS[:4].flatten().tolist()}
        answer = httpx.post(
            f"{said['url']}/v2/models/tiny/infer", json={"inputs": [tensor]}, trust_env=False, timeout=SECONDS
        )
        outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
        assert np.allclose(np.reshape(outputs["probabilities"], (4, 4)), expected()[:4], atol=1e-5)
        assert answer.headers["caltrain-simulated"] == "true"
        assert by_tritonclient(said["url"]) == expected().tobytes()


def by_tritonclient(url: str) -> bytes:
    """The probabilities' bits as an unmodified client of other servers gets them."""
    triton: Any = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    client = triton.InferenceServerClient(url.removeprefix("http://"))
    given = triton.InferInput("input", list(RECORDS.shape), "UINT8")
    given.set_data_from_numpy(RECORDS)
    found = client.infer("tiny", [given]).as_numpy("probabilities")
    client.close()
    assert found.dtype == np.float32
    raw: bytes = found.tobytes()
    return raw


def test_nobody_else_gets_an_answer(scene: Scene) -> None:
    """A user without a name in the package, the host itself, another owner, an enclave that was not expected."""
    records = scene.folder / "records.npy"
    assert failed("predict", scene.url, records, *scene.asking("eve")) == "user.not-named"
    assert failed("predict", scene.url, records, *scene.asking("op")) == "user.not-named"
    other = tuple("ed25519:" + "A" * 43 + "=" if word == scene.owner else word for word in scene.asking())
    assert failed("predict", scene.url, records, *other) == "signature.invalid"
    strict = scene.folder / "strict.toml"
    strict.write_text(scene.policy.read_text().replace("true", "false"))
    wary = tuple(strict if word == scene.policy else word for word in scene.asking())
    assert failed("predict", scene.url, records, *wary) == "evidence.simulated"
    plain = {"inputs": [{"name": "input", "datatype": "UINT8", "shape": [1, 1, 10, 10], "data": [0] * 100}]}
    sent = httpx.post(f"{scene.url}/v2/models/tiny/infer", json=plain, trust_env=False, timeout=SECONDS)
    assert (sent.status_code, sent.json()["detail"]["code"]) == (400, "infer.sealed-only")


def test_the_metrics_tell_of_no_user(scene: Scene) -> None:
    ran("predict", scene.url, scene.folder / "records.npy", *scene.asking())
    page = httpx.get(f"{scene.url}/metrics", trust_env=False, timeout=SECONDS).text
    assert 'model="tiny"' in page
    assert re.search(r"\buna\b", page) is None
    identity = msgspec.json.decode((scene.folder / "una" / "identity.json").read_bytes())
    assert identity["public_key"] not in page
