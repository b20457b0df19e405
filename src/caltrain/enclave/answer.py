"""Questions of model users: predict, trace, verdict, sealed in both directions, each input counted against a budget."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.accountability.attribution import Seen
from caltrain.boundary.messages import Done, Query, RecordDisclosure
from caltrain.boundary.sealed import (
    Answers,
    DisclosureNote,
    Question,
    SealedMessage,
    commit_input,
    open_message,
    seal_for,
)
from caltrain.crypto.digests import canonical_json, digest, to_raw
from caltrain.crypto.dsse import open_envelope
from caltrain.enclave.limits import draw
from caltrain.enclave.linkage import EVERYWHERE, Where
from caltrain.enclave.opinion import not_kept
from caltrain.enclave.run import Run, State, present
from caltrain.enclave.trace import traces
from caltrain.enclave.verdict import padded, verdict
from caltrain.errors import AccessError, DataError, IntegrityError
from caltrain.models.network import last_features
from caltrain.plan import Plan, User
from caltrain.training.batches import center_crop, normalise

_BATCH = 256
MAX_SCORES = 1 << 20


def query(run: Run, message: Query) -> tuple[Done, State]:
    """Answer a signed, sealed question of a user whom the plan names."""
    plan = present(run.plan)
    user = plan.user(message.user)
    sealed = open_envelope(message.envelope, "query", user.public_key, SealedMessage, step="query")
    if sealed.sender != user.name:
        raise _denied("user.other-sender", f"{user.name} asked in another name", "query")
    binding = run.vault.redeem(sealed, "query")
    question = open_message(sealed, Question, binding=binding, key=run.vault.encryption, step="query")
    inputs = _inputs(plan, question)
    _check_method(run, question)
    where = _where(run, question)
    left = _spend(run, user, question)
    with torch.inference_mode():
        answers = _answer(run, question, inputs, where, user=user, nonce=sealed.nonce, left=left)
    context = sealed.transcript
    # The answer key is 32 random bytes, so the digest commits to the answer without letting it be guessed.
    committed = digest("answer/v1", question.answer_key, canonical_json(_public(answers)))
    body = {"user": user.name, "kind": question.kind, "inputs": question.count, "model": run.model_digest}
    run.record("query", body | {"answer": committed})
    reply = seal_for(question.answer_key, "answer/v1", answers, context=context)
    return Done(sealed={user.name: reply}), State.LINKED


def _public(answers: Answers) -> dict[str, object]:
    public: dict[str, object] = {
        "model": answers.model,
        "predicted": answers.predicted,
        "traces": [t.payload for t in answers.traces],
    }
    return public | ({"verdict": answers.verdict.payload} if answers.verdict else {})


def _inputs(plan: Plan, question: Question) -> Tensor:
    size = math.prod(plan.data.shape) * plan.data.numpy_dtype.itemsize
    if len(question.inputs) != size * question.count:
        raise DataError(
            "query.shape",
            f"{len(question.inputs)} bytes for {question.count} inputs of {size} bytes",
            step="query",
            fix="Send inputs of the plan's shape and element type.",
        )
    if question.count * len(plan.data.classes) > MAX_SCORES:
        raise DataError(
            "query.too-many",
            f"{question.count} inputs with {len(plan.data.classes)} scores each, at most {MAX_SCORES} in all",
            step="query",
            fix="Ask about fewer inputs at a time.",
        )
    array = np.frombuffer(question.inputs, plan.data.numpy_dtype).reshape(-1, *plan.data.shape)
    if not np.isfinite(array).all():
        raise DataError("query.not-finite", "an input holds NaN or infinity", step="query", fix="Correct the input.")
    return torch.from_numpy(array.copy())


def _check_method(run: Run, question: Question) -> None:
    """Only traces are by methods, and by those of the plan."""
    methods = present(run.plan).trace.answered if question.kind == "trace" else ("fingerprint",)
    if question.method not in methods:
        raise _denied("query.method", f"no {question.kind} is answered by the method {question.method}", "query")
    if question.method != "fingerprint" and run.outputs is None:
        raise not_kept()


def _where(run: Run, question: Question) -> Where:
    """Which records count. Filters are for traces, where the plan allows them, and for parties that it names."""
    plan = present(run.plan)
    if (question.any_label or question.contributors) and not (plan.trace.filters and question.kind == "trace"):
        raise _denied("query.filters", "the question chooses classes or contributors", "query")
    if not question.contributors:
        return EVERYWHERE
    names = {plan.party(name).name for name in question.contributors}
    parties = present(run.manifest).parties  # a party that only holds out has no record that could be named
    linked = {party.name for party in parties if not all(shard.held_out for shard in party.shards)}
    return Where(contributors=frozenset(names & linked))


def _spend(run: Run, user: User, question: Question) -> int:
    """Count the inputs against the user's budget before anything is computed; returns what is left."""
    if question.kind not in user.may:
        raise _denied("user.may-not", f"{user.name} may not {question.kind}", "query")
    left = user.budget - run.spent.get(user.name, 0)
    if question.count > left:
        raise _denied(
            "user.budget-spent", f"{user.name} may ask about {left} more inputs, asked about {question.count}", "query"
        )
    draw(run, user, question.count)
    run.spent[user.name] = run.spent.get(user.name, 0) + question.count
    return left - question.count


def _answer(
    run: Run, question: Question, inputs: Tensor, where: Where, *, user: User, nonce: str, left: int
) -> Answers:
    plan, model = present(run.plan), present(run.model)
    features, scores = [], []
    for part in torch.split(inputs, _BATCH):
        x = normalise(center_crop(part, plan.model.size), plan.data, channels_last=plan.training.channels_last)
        last, logits = last_features(model, plan.model, x)
        features.append(last)
        scores.append(logits.softmax(1))
    asked = Seen(torch.cat(features), torch.cat(scores), torch.cat(scores).argmax(1))
    probabilities, embeddings = asked.probabilities, F.normalize(asked.features, dim=1)
    # A norm that overflows leaves an embedding of zeros, which is equally far from every record.
    if not bool(probabilities.isfinite().all() and embeddings.any(dim=1).all()):
        raise DataError(
            "query.overflow",
            "the model's values for an input are not finite, or leave it without a fingerprint",
            step="query",
            fix="Send inputs of the size that the model was trained on.",
        )
    predicted = tuple(asked.labels.tolist())
    if question.kind == "predict":
        table = tuple(tuple(round(float(s), 6) for s in row) for row in probabilities)
        return Answers(model=run.model_digest, predicted=predicted, scores=table, budget_left=left)
    commitments = [commit_input(nonce, x.numpy().tobytes()) for x in inputs]
    if question.kind == "verdict":
        signed = verdict(run, embeddings, predicted=predicted, user=user.name, nonce=nonce, inputs=commitments)
        return padded(run, Answers(model=run.model_digest, predicted=predicted, verdict=signed, budget_left=left))
    signed_traces = traces(run, question, asked, where=where, user=user.name, nonce=nonce, inputs=commitments)
    return Answers(model=run.model_digest, predicted=predicted, traces=signed_traces, budget_left=left)


def record_disclosure(run: Run, message: RecordDisclosure) -> tuple[Done, State]:
    """Note in the chain that a party has disclosed one of its records."""
    party = present(run.plan).party(message.party)
    note = open_envelope(message.envelope, "disclosure-note", party.public_key, DisclosureNote, step="disclosure")
    record = present(run.linkage).find(run.model_digest, to_raw(note.commitment))
    if note.run != run.vault.run or note.party != party.name or record is None or record.party != party.name:
        raise IntegrityError(
            "disclosure.not-own",
            f"{party.name} has no such record in this run",
            step="disclosure",
            fix="Disclose a record that a trace of this run named as yours.",
        )
    body: dict[str, object] = {"party": party.name, "commitment": note.commitment}
    if not run.chain.holds("disclosure", body):  # a note says the same however often the host repeats it
        run.record("disclosure", body)
    return Done(), State.LINKED


def _denied(code: str, what: str, step: str) -> AccessError:
    return AccessError(code, what, step=step, fix="The plan decides who may ask what, and how often.")
