"""Using a received model: it is read whole or refused, and takes inputs of the plan's form only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from caltrain.boundary import messages as m
from caltrain.errors import ConfigError, DataError, IntegrityError
from caltrain.models.weights import decode_state, encode_state
from caltrain.participant.model import embed, load_model
from caltrain.participant.receive import receive, run_folder
from caltrain.records.commitment import RecordRef
from support.folders import identity_of
from support.samples import refused
from support.scripted_host import ScriptedHost
from support.world import World, pictures
from support.worlds import finished_world


@pytest.fixture
def finished() -> World:
    """A world whose run is over."""
    return finished_world()


@pytest.fixture
def run(finished: World, tmp_path: Path) -> Path:
    """A run folder of a party."""
    alpha = identity_of(finished.parties["alpha"], tmp_path / "alpha")
    with ScriptedHost(finished).client() as client:
        receive(client, finished.plan, alpha, finished.manifest)
    return run_folder(alpha, finished.manifest.run)


def test_the_model_predicts_as_the_enclave_does(finished: World, run: Path) -> None:
    inputs = pictures(5, seed=3)
    asked = finished.question("predict", inputs)
    answers = asked.open(finished.done(m.Query("una", asked.envelope)).sealed["una"])
    classes, probabilities = load_model(run).predict(inputs)
    assert tuple(classes) == answers.predicted
    assert np.allclose(probabilities, answers.scores, atol=1e-5)


def test_fingerprints_are_those_that_the_enclave_links(finished: World, run: Path) -> None:
    model, (images, _) = load_model(run), finished.data()
    fingerprints, probabilities = embed(model.module, model.plan, images.numpy())
    assert np.linalg.norm(fingerprints, axis=1) == pytest.approx(np.ones(len(images)), abs=1e-5)
    assert (probabilities == model.predict(images.numpy())[1]).all()
    refs = [*finished.manifest.references()]
    assert finished.run.linkage is not None
    table = finished.run.linkage.table(finished.run.model_digest, limit=1 << 20)
    linked = {
        RecordRef(table.shards[source][0], table.shards[source][1], int(leaf)): row.numpy()
        for source, leaf, row in zip(table.source, table.leaf, table.fingerprints, strict=True)
    }
    for reference, fingerprint in zip(refs, fingerprints, strict=True):
        assert linked[reference] == pytest.approx(fingerprint, abs=1e-3)  # what is stored is rounded


def test_inputs_of_another_form_are_refused(run: Path) -> None:
    model = load_model(run)
    for inputs in (pictures(1, seed=3, dtype="f32"), pictures(1, seed=3)[0], pictures(1, seed=3).reshape(1, 4, 1, 4)):
        with refused(DataError, "predict.shape"):
            model.predict(inputs)


@pytest.mark.parametrize("name", ["plan.json", "run.json", "model.safetensors"])
def test_a_folder_that_lacks_a_part_holds_no_model(run: Path, name: str) -> None:
    (run / name).unlink()
    with refused(ConfigError, "model.unreadable") as caught:
        load_model(run)
    assert name in caught.value.what


@pytest.mark.parametrize("garbage", [b"", b"{}", b"\xff\xfe", b'{"manifest":' + b"[" * 100_000])
def test_a_damaged_record_of_the_run_is_named(run: Path, garbage: bytes) -> None:
    (run / "run.json").write_bytes(garbage)
    with refused(ConfigError, "model.unreadable"):
        load_model(run)


def test_weights_that_were_changed_after_they_were_verified_are_refused(run: Path) -> None:
    state = decode_state((run / "model.safetensors").read_bytes(), step="test")
    next(value for value in state.values() if value.is_floating_point()).view(-1)[0] += 1
    (run / "model.safetensors").write_bytes(encode_state(state))
    with refused(IntegrityError, "model.other-digest"):
        load_model(run)


@pytest.mark.parametrize("garbage", [b"", b"\x80\x04."])
def test_damaged_weights_are_refused(run: Path, garbage: bytes) -> None:
    (run / "model.safetensors").write_bytes(garbage)
    with refused(IntegrityError, "weights.malformed"):
        load_model(run)
