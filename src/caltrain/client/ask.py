"""Ask an attested enclave: predict, trace, or a verdict. Inputs and answers are sealed; the host carries them blind."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.attestation.verify import Claims, Policy, match_plan, verify_evidence
from caltrain.boundary.sealed import (
    MAX_QUESTIONS,
    MAX_SEALED,
    Answers,
    Question,
    TraceStatement,
    commit_input,
    open_for,
    seal_message,
    transcript_digest,
)
from caltrain.crypto.dsse import MAX_ENVELOPE_BYTES, Envelope, SigningKey, open_envelope
from caltrain.errors import AccessError, DataError, IntegrityError
from caltrain.host_client import HostClient
from caltrain.plan import Method, Plan, Right
from caltrain.provenance.verdict import VerdictStatement, inputs_root

_STEP = "read answer"


@dataclass(frozen=True)
class Answered:
    """A verified answer: the enclave's claims and evidence, what it said, its signed traces or verdict."""

    claims: Claims
    evidence: EvidenceBundle
    answers: Answers
    traces: tuple[TraceStatement, ...]
    envelopes: tuple[Envelope, ...]
    verdicts: tuple[VerdictStatement, ...] = ()


def ask(
    host: HostClient,
    plan: Plan,
    policy: Policy,
    *,
    kind: Right,
    user: str,
    signer: SigningKey,
    inputs: NDArray[np.generic],
    clock: Callable[[], datetime],
    any_label: bool = False,
    contributors: Sequence[str] = (),
    method: Method = "fingerprint",
) -> Answered:
    """Ask about `inputs` (N, C, H, W) of the plan's element type, at most `most_at_once`.

    Where the plan allows it, traces are of records of any class, of these contributors alone, or by another method.

    Raises AttestationError before anything is sealed, DataError, AccessError (not named, budget spent).
    """
    _check_user(plan, user, signer)
    _check(plan, inputs)
    nonce = os.urandom(32).hex()
    bundle = host.get("/v1/attestation", EvidenceBundle, params={"purpose": "query", "nonce": nonce})
    claims = verify_evidence(bundle, policy, purpose="query", plan=plan.digest(), nonce=nonce, now=clock())
    match_plan(claims.measurement, plan)
    raw = np.ascontiguousarray(inputs)
    question = Question(
        kind=kind,
        count=len(raw),
        inputs=raw.tobytes(),
        answer_key=os.urandom(32),
        any_label=any_label,
        contributors=tuple(contributors),
        method=method,
    )
    envelope = seal_message("query", question, binding=bundle.binding, sender=user, signer=signer)
    sealed = host.post_bytes(f"/v1/users/{user}/query", envelope, limit=MAX_SEALED)
    context = transcript_digest(bundle.binding, user)
    answers = open_for(question.answer_key, "answer/v1", sealed, Answers, context=context, step=_STEP)
    traces = tuple(_trace(e, bundle, answers, question, user=user) for e in answers.traces)
    _check_answer(kind, answers, traces, raw, nonce)
    if kind != "verdict":
        return Answered(claims, bundle, answers, traces, answers.traces)
    envelope, verdict = _verdict(bundle, answers, raw, user=user)
    return Answered(claims, bundle, answers, traces, (envelope,), (verdict,))


def input_commitment(nonce: str, pixels: NDArray[np.generic]) -> str:
    """What a trace statement says of its input: with input and nonce the user can show which one it was."""
    return commit_input(nonce, np.ascontiguousarray(pixels).tobytes())


def most_at_once(plan: Plan) -> int:
    """How many inputs of this plan one question may hold: 1024, fewer where they are large."""
    input_bytes = math.prod(plan.data.shape) * plan.data.numpy_dtype.itemsize
    # Base64 twice, sealed and signed: 16/9; the rest of the message takes less than 16 KiB.
    return min(MAX_QUESTIONS, (MAX_ENVELOPE_BYTES - (1 << 14)) * 9 // 16 // input_bytes)


def _check_user(plan: Plan, user: str, signer: SigningKey) -> None:
    if plan.user(user).public_key != signer.public:
        raise AccessError(
            "user.other-key",
            f"the plan names another key for {user}",
            step="ask",
            fix="Ask with the key that the plan names, or have the plan changed and approved again.",
        )


def _check(plan: Plan, inputs: NDArray[np.generic]) -> None:
    if inputs.shape[1:] != plan.data.shape or inputs.dtype != plan.data.numpy_dtype:
        raise DataError(
            "ask.shape",
            f"inputs of {inputs.shape} {inputs.dtype}, the plan has {plan.data.shape} {plan.data.dtype}",
            step="ask",
            fix="Convert the inputs to the plan's shape and element type.",
        )
    most = most_at_once(plan)
    if not 1 <= len(inputs) <= most:
        raise DataError(
            "ask.count", f"{len(inputs)} inputs at once", step="ask", fix=f"Ask about 1 to {most} at a time."
        )


def _trace(
    envelope: Envelope, bundle: EvidenceBundle, answers: Answers, question: Question, *, user: str
) -> TraceStatement:
    trace = open_envelope(envelope, "trace", bundle.binding.signing_key, TraceStatement, step=_STEP)
    said = (trace.user, trace.nonce, trace.model, trace.any_label, trace.contributors, trace.method)
    asked = (question.any_label, question.contributors, question.method)
    if said != (user, bundle.binding.nonce, answers.model, *asked):
        raise _mismatch("a trace is of another question or model")
    return trace


def _check_answer(
    kind: Right, answers: Answers, traces: Sequence[TraceStatement], inputs: NDArray[np.generic], nonce: str
) -> None:
    due = len(inputs) if kind == "trace" else 0
    if (len(answers.predicted), len(traces)) != (len(inputs), due):
        raise _mismatch(f"{len(answers.predicted)} answers and {len(traces)} traces for {len(inputs)} inputs")
    for index, trace in enumerate(traces):
        own = (index, answers.predicted[index], input_commitment(nonce, inputs[index]))
        if (trace.index, trace.predicted, trace.input_commitment) != own:
            raise _mismatch(f"trace {index} is not of the input that was asked about")


def _verdict(
    bundle: EvidenceBundle, answers: Answers, inputs: NDArray[np.generic], *, user: str
) -> tuple[Envelope, VerdictStatement]:
    """The signed verdict, which must be of this very question."""
    if answers.verdict is None:
        raise _mismatch("there is no verdict in it")
    verdict = open_envelope(answers.verdict, "verdict", bundle.binding.signing_key, VerdictStatement, step=_STEP)
    nonce = bundle.binding.nonce
    asked = inputs_root(input_commitment(nonce, x) for x in inputs)
    said = (verdict.user, verdict.nonce, verdict.model, verdict.predicted, verdict.inputs, len(verdict.kinds))
    if said != (user, nonce, answers.model, answers.predicted, len(inputs), len(inputs)):
        raise _mismatch("the verdict is of another question or model")
    if verdict.input_commitment != asked:
        raise _mismatch("the verdict is not of the inputs that were asked about")
    verdict.records()  # raises where they cannot be read
    return answers.verdict, verdict


def _mismatch(what: str) -> IntegrityError:
    return IntegrityError("answer.mismatch", f"the answer was refused: {what}", step=_STEP, fix="Ask again; report it.")
