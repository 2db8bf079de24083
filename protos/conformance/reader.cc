// Reads the conformance corpus in C++ and says where it comes to something else: `reader DIRECTORY`.
//
// It is also the whole of what a client has to do with a stream, in some two hundred lines.
#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <google/protobuf/util/message_differencer.h>
#include <openssl/sha.h>
#include <zstd.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "google/rpc/code.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "vlm_spectra/v1/spectra_service.pb.h"

namespace v1 = vlm_spectra::v1;
using google::protobuf::ListValue;
using google::protobuf::Struct;
using google::protobuf::Value;

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string unhex(const std::string& text) {
  std::string bytes;
  for (size_t at = 0; at + 1 < text.size(); at += 2) bytes += static_cast<char>(std::stoi(text.substr(at, 2), nullptr, 16));
  return bytes;
}

std::string sha256(const std::string& data) {
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(data.data()), data.size(), digest);
  std::string text;
  for (unsigned char byte : digest) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

uint32_t crc32c(const std::string& data, uint32_t before = 0) {
  uint32_t crc = ~before;
  for (unsigned char byte : data) {
    crc ^= byte;
    for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);
  }
  return ~crc;
}

struct Failure {
  std::string reason, message, field, request_id;
  std::map<std::string, std::string> metadata;
  double retry_after = 0;
};

// What came is not what was sent: a capture goes on with another call.
struct Damaged : Failure {};

const std::map<int, std::pair<std::string, size_t>> kTypes = {
    {1, {"bool", 1}},    {2, {"uint8", 1}},    {3, {"int8", 1}},    {4, {"int16", 2}},
    {5, {"int32", 4}},   {6, {"int64", 8}},    {7, {"float16", 2}}, {8, {"bfloat16", 2}},
    {9, {"float32", 4}}, {10, {"float64", 8}}, {11, {"float8_e4m3fn", 1}}, {12, {"float8_e5m2", 1}}};

struct Tensor {
  std::string name, data;
  v1::TensorHeader header;
  size_t size = 0, item = 1;
};

// Bytes of a compressed chunk: Zstandard, then the bytes of one place in the element brought back to their elements.
std::string decompress(const std::string& packed, size_t item, size_t bound) {
  unsigned long long size = ZSTD_getFrameContentSize(packed.data(), packed.size());
  if (size > bound) throw Failure{"INTERNAL"};  // also what stands for an error and for no size
  std::string plain(size, '\0'), out(size, '\0');
  if (ZSTD_decompress(plain.data(), size, packed.data(), packed.size()) != size) throw Failure{"INTERNAL"};
  if (item == 1 || size % item) return plain;
  for (size_t i = 0; i < size; i++) out[i % (size / item) * item + i / (size / item)] = plain[i];
  return out;
}

class Stream {
 public:
  std::map<uint32_t, Tensor> tensors;
  std::vector<std::tuple<int, int, int, std::string>> tokens;
  std::string capture_id;
  bool ended = false;

  void take(const v1::RunWithCacheResponse& event) {
    if (event.has_header()) announce(event.header());
    if (event.has_chunk()) put(event.chunk());
    if (event.has_summary()) ended = true;
    if (event.has_token()) {
      const v1::Token& token = event.token();
      if (seen_.insert({token.row(), token.index()}).second)
        tokens.emplace_back(token.row(), token.index(), token.id(), token.text());
    }
  }

 private:
  std::set<std::pair<int, int>> seen_;

  void announce(const v1::Header& header) {
    if (capture_id.empty()) capture_id = header.capture_id();
    for (const v1::TensorHeader& each : header.tensors()) {
      if (tensors.count(each.index())) continue;
      auto type = kTypes.find(each.dtype());
      if (type == kTypes.end()) throw Failure{"INVALID_INPUT"};
      size_t size = type->second.second;
      for (int64_t extent : each.shape()) size *= extent;
      if (size != each.byte_count()) throw Failure{"INTERNAL"};
      tensors[each.index()] = {each.name(), "", each, size, type->second.second};
    }
  }

  void put(const v1::TensorChunk& chunk) {
    auto found = tensors.find(chunk.index());
    if (found == tensors.end() || chunk.offset() != found->second.data.size()) throw Damaged{{"INTERNAL"}};
    if (crc32c(chunk.data()) != chunk.crc32c()) throw Damaged{{"INTERNAL"}};
    Tensor& tensor = found->second;
    size_t room = tensor.size - tensor.data.size();
    bool packed = tensor.header.compression() == v1::COMPRESSION_ZSTD;
    std::string data = packed ? decompress(chunk.data(), tensor.item, room) : chunk.data();
    if (data.size() > room) throw Failure{"INTERNAL"};
    tensor.data += data;
  }
};

// How a call ends that does not end well.
Failure failure_of(const std::string& code, const std::string& message, const std::string& details) {
  const std::map<std::string, std::string> by_code = {
      {"CANCELLED", "CANCELLED"},     {"DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"},
      {"UNAVAILABLE", "UNAVAILABLE"}, {"INVALID_ARGUMENT", "INVALID_INPUT"},
      {"UNIMPLEMENTED", "NOT_SUPPORTED"}};
  const std::set<std::string> known = {
      "INVALID_INPUT", "UNKNOWN_HOOK", "QUEUE_FULL", "IMAGE_NOT_FOUND", "CAPTURE_NOT_FOUND", "OUT_OF_DEVICE_MEMORY"};
  Failure failure{by_code.count(code) ? by_code.at(code) : "INTERNAL", message};
  google::rpc::Status status;
  status.ParseFromString(details);
  for (const auto& detail : status.details()) {
    google::rpc::ErrorInfo info;
    google::rpc::BadRequest request;
    google::rpc::RetryInfo retry;
    if (detail.UnpackTo(&info)) {
      if (known.count(info.reason())) failure.reason = info.reason();
      failure.metadata.insert(info.metadata().begin(), info.metadata().end());
      failure.request_id = failure.metadata["request_id"];
      failure.metadata.erase("request_id");
    } else if (detail.UnpackTo(&request)) {
      failure.field = request.field_violations(0).field();
    } else if (detail.UnpackTo(&retry)) {
      failure.retry_after = retry.retry_delay().seconds() + retry.retry_delay().nanos() / 1e9;
    }
  }
  return failure;
}

// The messages of a file. What is no chunk ends with the checksum of all such messages so far, field 14 as a fixed32;
// where the first has none, none has.
void play(const std::string& body, Stream& stream) {
  uint32_t crc = 0;
  bool sealed = false;
  for (size_t at = 0; at < body.size() && !stream.ended;) {
    uint32_t size = 0;
    for (int i = 1; i < 5; i++) size = size << 8 | static_cast<unsigned char>(body[at + i]);
    v1::RunWithCacheResponse event;
    if (!event.ParseFromArray(body.data() + at + 5, size)) throw Damaged{{"INTERNAL"}};
    if (!event.has_chunk()) {
      crc = crc32c(body.substr(at + 5, event.has_crc32c() ? size - 5 : size), crc);
      bool right = event.has_crc32c() ? crc == event.crc32c() : !sealed;
      if (!right) throw Damaged{{"INTERNAL"}};
      sealed = event.has_crc32c();
    }
    stream.take(event);
    at += 5 + size;
  }
}

const Value& of(const Struct& object, const std::string& name) {
  static const Value none;
  auto found = object.fields().find(name);
  return found == object.fields().end() ? none : found->second;
}

void require(bool true_, const std::string& what) {
  if (!true_) throw std::runtime_error(what);
}

void check(const std::string& folder, const Struct& played) {
  Stream stream;
  std::optional<Failure> failure;
  const ListValue& calls = of(played, "calls").list_value();
  int made = 0;
  for (bool again = true; again;) {
    again = false;
    require(made < calls.values_size(), "a call too many");
    const Struct& call = calls.values(made++).struct_value();
    if (made > 1) {
      const Struct& resume = of(call, "resume").struct_value();
      require(of(resume, "capture_id").string_value() == stream.capture_id, "resumes another capture");
      const Struct& offsets = of(resume, "offsets").struct_value();
      for (const auto& [index, tensor] : stream.tensors) {
        double wanted = of(offsets, std::to_string(index)).number_value();
        require(wanted == static_cast<double>(tensor.data.size()), "resumes from another offset");
      }
    }
    failure.reset();
    const Struct& ends = of(call, "ends").struct_value();
    std::string code = of(ends, "code").string_value(), details = unhex(of(ends, "details").string_value());
    try {
      play(read(folder + "/" + of(call, "file").string_value()), stream);
      if (stream.ended) break;
      failure = code == "OK" ? Failure{"UNAVAILABLE"} : failure_of(code, of(ends, "message").string_value(), details);
      again = details.empty() && (code == "OK" || code == "UNAVAILABLE") && !stream.capture_id.empty();
    } catch (const Damaged& damage) {
      failure = damage;
      again = !stream.capture_id.empty();
    } catch (const Failure& other) {
      failure = other;
    }
  }
  require(made == calls.values_size(), "a call too few");
  std::vector<const Tensor*> complete;
  for (const auto& [index, tensor] : stream.tensors) {
    if (tensor.data.size() == tensor.size) complete.push_back(&tensor);
  }
  if (!failure && complete.size() < stream.tensors.size()) failure = Failure{"UNAVAILABLE"};

  const Value& wanted = of(played, "error");
  require(failure.has_value() == wanted.has_struct_value(), failure ? "fails: " + failure->reason : "does not fail");
  if (failure) {
    const auto& fields = wanted.struct_value().fields();
    const std::map<std::string, std::string> texts = {{"reason", failure->reason},
                                                      {"message", failure->message},
                                                      {"field", failure->field},
                                                      {"request_id", failure->request_id}};
    for (const auto& [name, text] : texts) {
      if (fields.count(name)) require(fields.at(name).string_value() == text, "another " + name + ": " + text);
    }
    if (fields.count("retry_after")) require(fields.at("retry_after").number_value() == failure->retry_after, "retry_after");
    if (fields.count("metadata")) {
      for (const auto& [name, value] : fields.at("metadata").struct_value().fields())
        require(failure->metadata[name] == value.string_value(), "another metadata " + name);
    }
  }

  const ListValue& tensors = of(played, "tensors").list_value();
  require(tensors.values_size() == static_cast<int>(complete.size()), "another number of tensors");
  for (int i = 0; i < tensors.values_size(); i++) {
    const Struct& tensor = tensors.values(i).struct_value();
    require(of(tensor, "name").string_value() == complete[i]->name, "another name");
    require(of(tensor, "dtype").string_value() == kTypes.at(complete[i]->header.dtype()).first, "another type");
    require(of(tensor, "sha256").string_value() == sha256(complete[i]->data), "other bytes");
    const ListValue& shape = of(tensor, "shape").list_value();
    require(shape.values_size() == complete[i]->header.shape_size(), "another shape");
    for (int axis = 0; axis < shape.values_size(); axis++)
      require(shape.values(axis).number_value() == complete[i]->header.shape(axis), "another shape");
  }
  const ListValue& tokens = of(played, "tokens").list_value();
  require(tokens.values_size() == static_cast<int>(stream.tokens.size()), "another number of tokens");
  for (int i = 0; i < tokens.values_size(); i++) {
    const ListValue& token = tokens.values(i).list_value();
    const auto& [row, index, id, text] = stream.tokens[i];
    require(token.values(0).number_value() == row && token.values(1).number_value() == index &&
                token.values(2).number_value() == id && token.values(3).string_value() == text,
            "another token");
  }
}

void check_message(const Struct& message) {
  v1::RunWithCacheResponse event, wanted;
  bool readable = event.ParseFromString(unhex(of(message, "hex").string_value()));
  const Value& json = of(message, "json");
  require(readable == json.has_struct_value(), readable ? "is read" : "is not read");
  if (!readable) return;
  std::string text;
  require(google::protobuf::util::MessageToJsonString(json, &text).ok(), "json");
  require(google::protobuf::util::JsonStringToMessage(text, &wanted).ok(), "json");
  event.DiscardUnknownFields();
  require(google::protobuf::util::MessageDifferencer::Equals(event, wanted), "another meaning");
}

int main(int, char** arguments) {
  std::string folder = arguments[1];
  int faults = 0, cases = 0;
  auto all = [&](const std::string& file, const std::function<void(const Struct&)>& one) {
    Value list;
    auto parsed = google::protobuf::util::JsonStringToMessage(read(folder + "/" + file), &list);
    if (!parsed.ok()) throw std::runtime_error(file + " is no JSON");
    for (const Value& each : list.list_value().values()) {
      cases++;
      try {
        one(each.struct_value());
      } catch (const std::exception& fault) {
        faults++;
        std::cout << file << " " << of(each.struct_value(), "name").string_value() << ": " << fault.what() << "\n";
      }
    }
  };
  all("streams.json", [&](const Struct& played) { check(folder, played); });
  all("messages.json", check_message);
  std::cout << cases - faults << " of " << cases << " cases passed\n";
  return faults ? 1 : 0;
}
