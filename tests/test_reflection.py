"""A client that knows nothing but the address, as grpcurl is one: it learns the calls by reflection and makes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


class Generic:
    """Calls by name, with requests and responses as dictionaries.

    Args:
        address: The server's.
    """

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._database = ProtoReflectionDescriptorDatabase(self._channel)
        self.pool = DescriptorPool(self._database)

    def __enter__(self) -> Generic:
        return self

    def __exit__(self, *_: Any) -> None:
        self._channel.close()

    def services(self) -> list[str]:
        return sorted(self._database.get_services())

    def call(self, name: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        service, method = name.split("/")
        found = self.pool.FindServiceByName(service).methods_by_name[method]
        asked = ParseDict(request, GetMessageClass(found.input_type)())
        answers = self._channel.unary_stream(
            f"/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(found.output_type).FromString,
        )
        for answer in answers(asked, timeout=60):
            yield MessageToDict(answer, descriptor_pool=self.pool)


@pytest.fixture(scope="module")
def generic(server: str) -> Iterator[Generic]:
    with Generic(server) as client:
        yield client


def test_it_finds_every_service(generic: Generic) -> None:
    assert {
        "vlm_spectra.v1.SpectraService",
        "vlm_spectra.v1.ModelService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    } <= set(generic.services())
    for service in generic.services():
        for method in generic.pool.FindServiceByName(service).methods:
            assert method.input_type.full_name
            assert method.output_type.full_name


def test_it_makes_calls(generic: Generic) -> None:
    (listed,) = generic.call("vlm_spectra.v1.ModelService/ListModels", {})
    assert listed["models"][0]["name"] == "spectra-tiny"
    (health,) = generic.call("grpc.health.v1.Health/Check", {"service": "vlm_spectra.v1.SpectraService"})
    assert health == {"status": "SERVING"}
    asked = {"prompts": [{"task": "Say hello"}], "options": {"maxNewTokens": 2}}
    events = list(generic.call("vlm_spectra.v1.SpectraService/Generate", asked))
    assert len([event for event in events if "token" in event]) == 2
    assert "summary" in events[-1]


def test_what_it_learns_is_the_contract(generic: Generic) -> None:
    """Every file that the server describes is the one that this package was made from."""
    from vlm_spectra.v1 import inputs_pb2, model_service_pb2, spectra_service_pb2, stream_pb2, tensor_pb2

    for module in (inputs_pb2, model_service_pb2, spectra_service_pb2, stream_pb2, tensor_pb2):
        told, own = descriptor_pb2.FileDescriptorProto(), descriptor_pb2.FileDescriptorProto()
        generic.pool.FindFileByName(module.DESCRIPTOR.name).CopyToProto(told)
        module.DESCRIPTOR.CopyToProto(own)
        assert told == own


def test_what_there_is_not(generic: Generic) -> None:
    with pytest.raises(KeyError):
        generic.pool.FindServiceByName("vlm_spectra.v1.NoSuchService")
    with pytest.raises(grpc.RpcError) as caught:
        list(generic.call("grpc.health.v1.Health/Check", {"service": "nothing"}))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
