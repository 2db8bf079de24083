"""Damage on the way to a client shows, in whichever byte of an answer it is: an error of ours, or the right answer."""

from __future__ import annotations

import grpc
import pytest
import vlm_spectra as vs
from calls import Raw, prompts
from proxy import Proxy
from vlm_spectra import errors
from vlm_spectra.network import checksum, chunks
from vlm_spectra.network.streams import TensorStream
from vlm_spectra.v1 import model_service_pb2 as mpb
from vlm_spectra.v1 import spectra_service_pb2 as spb

TASK = "Say hello"
OPTIONS = spb.GenerateOptions(max_new_tokens=4)


class Played:
    """A call that plays messages."""

    def __init__(self, messages):
        self.messages = messages

    def __iter__(self):
        return iter(self.messages)

    def cancel(self):
        pass


@pytest.fixture(scope="module")
def answered(server):
    """A generation's messages as they come from the server."""
    client = Raw(server)
    yield client.ask("Generate", spb.GenerateRequest(prompts=prompts(TASK), options=OPTIONS))
    client.close()


def read(messages):
    """What a client has of them in the end: tokens, tensors, and what is kept of a header."""
    tokens = []
    stream = TensorStream(Played(messages), "server:1", "numpy", tokens.append)
    stream.wait()
    header = stream.header.request_id, stream.header.model, stream.header.revision
    return tokens, {name: stream.get(name).tolist() for name in stream.names}, header, stream.summary


def changed(messages, at, place, flip):
    message = messages[at]
    return [
        *messages[:at],
        message[:place] + bytes((message[place] ^ flip,)) + message[place + 1 :],
        *messages[at + 1 :],
    ]


@pytest.mark.parametrize("flip", [0x01, 0x55, 0x80])
def test_every_byte_of_a_stream(answered, flip):
    """Where one was changed, the stream ends with an error, and not one wrong token was told before."""
    right, places, found_out = read(answered), 0, 0
    for at, message in enumerate(answered):
        for place in range(len(message)):
            told = []
            stream = TensorStream(Played(changed(answered, at, place, flip)), "server:1", "numpy", told.append)
            places += 1
            with pytest.raises(errors.SpectraError) as caught:
                stream.wait()
                raise AssertionError(f"byte {place} of message {at}")
            found_out += isinstance(caught.value, errors.InternalError)
            assert told == right[0][: len(told)], f"byte {place} of message {at}"
    assert places > 300
    assert found_out == places


def test_a_message_that_is_lost_or_comes_twice(answered):
    right = read(answered)
    assert len(right[0]) == 4
    for at in range(len(answered)):
        for messages in (answered[:at] + answered[at + 1 :], [*answered[: at + 1], *answered[at:]]):
            if messages[: len(answered)] == answered:
                continue  # what comes behind the summary is not read
            with pytest.raises(errors.SpectraError):
                read(messages)


def test_an_older_server_has_no_checksums(answered):
    assert any(chunks.parse(message) is not None for message in answered)
    old = [message if chunks.parse(message) is not None else message[:-5] for message in answered]
    assert all(not spb.GenerateResponse.FromString(message).HasField("crc32c") for message in old)
    assert read(old)[:2] == read(answered)[:2]


UNARY = {
    "ModelService/GetModel": (mpb.GetModelRequest(), mpb.GetModelResponse),
    "ModelService/ListModels": (mpb.ListModelsRequest(), mpb.ListModelsResponse),
    "SpectraService/Prepare": (spb.PrepareRequest(prompts=prompts(TASK)), spb.PrepareResponse),
    "SpectraService/Estimate": (
        spb.EstimateRequest(run=spb.CaptureRun(prompts=prompts(TASK), selection=spb.CaptureSelection(hooks=["*"]))),
        spb.EstimateResponse,
    ),
    "SpectraService/ReleaseCapture": (spb.ReleaseCaptureRequest(capture_id="none"), spb.ReleaseCaptureResponse),
}


@pytest.mark.parametrize("method", UNARY)
def test_every_byte_of_an_answer_of_one_message(server, remote_numpy, monkeypatch, method):
    request, kind = UNARY[method]
    if method.endswith("Estimate"):
        request.run.selection.hooks[:] = ["lm.blocks.*.hook_resid_post"]
        request.run.forward.SetInParent()
    with grpc.insecure_channel(server) as channel:
        data = channel.unary_unary(f"/vlm_spectra.v1.{method}")(request.SerializeToString(), timeout=60)
    assert kind.FromString(data).HasField("crc32c")
    played = []
    monkeypatch.setattr(
        remote_numpy,
        "_own_channel",
        type("Channel", (), {"unary_unary": lambda *_, **__: lambda *_, **__: played[-1]})(),
    )
    played.append(data)
    assert remote_numpy._unary(method, request, kind) == kind.FromString(data)
    for place in range(0, len(data), max(len(data) // 400, 1)):
        for flip in (0x01, 0x55):
            played.append(data[:place] + bytes((data[place] ^ flip,)) + data[place + 1 :])
            with pytest.raises(errors.InternalError):
                remote_numpy._unary(method, request, kind)
                raise AssertionError(f"byte {place}")


def test_tokens_over_a_damaging_network(server):
    """Tokens that are streamed over plain text: damaged at eight places, none of them is ever wrong."""
    with Proxy(server) as proxy, vs.connect(proxy.address, arrays="numpy") as model:
        inputs = model.prepare_messages(TASK)
        begun = proxy.carried
        expected = list(model.stream(inputs, 4))
        length = proxy.carried - begun
    errors_found = 0
    for number in range(8):
        with Proxy(server) as proxy, vs.connect(proxy.address, arrays="numpy", timeout=4) as model:
            told = []
            try:
                inputs = model.prepare_messages(TASK)
                proxy.damage = [proxy.carried + length * number // 8]
                told.extend(model.stream(inputs, 4))
                assert len(told) == len(expected)
            except errors.SpectraError:
                errors_found += 1
            assert told == expected[: len(told)]
    assert errors_found, "none of the places mattered"


def test_an_answer_without_its_message():
    """What gRPC gives for one answer that damage ended early, and well."""
    with pytest.raises(checksum.Damaged, match="lost on its way"):
        checksum.opened(mpb.GetModelResponse, None)
