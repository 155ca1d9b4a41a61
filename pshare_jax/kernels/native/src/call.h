// What the XLA FFI handlers of the CPU kernels share: a call's buffers and attributes, checked.
#pragma once

#include <cstring>
#include <string>
#include <type_traits>

#include "fp8.h"
#include "paged_rows.h"
#include "weight_only.h"
#include "xla/ffi/api/ffi.h"

namespace pshare {

namespace ffi = xla::ffi;

// The dtype of packed weights W of 8 bits, which have a scale for each column; INVALID for others.
template <class W>
constexpr ffi::DataType narrow_dtype = ffi::DataType::INVALID;
template <>
constexpr ffi::DataType narrow_dtype<Int8> = ffi::DataType::U8;
template <class E>
constexpr ffi::DataType narrow_dtype<Narrow<WholeNumbers, E>> = ffi::DataType::U8;
template <class E>
constexpr ffi::DataType narrow_dtype<Narrow<SmallFloats, E>> = ffi::DataType::F8E4M3FN;
template <class W>
constexpr bool is_narrow = narrow_dtype<W> != ffi::DataType::INVALID;

// The dtype of what is read as T; INVALID where that is bytes of whatever it is.
template <class T>
constexpr ffi::DataType dtype_of() {
  if (std::is_same_v<T, float>) return ffi::DataType::F32;
  if (std::is_same_v<T, bf16>) return ffi::DataType::BF16;
  if (std::is_same_v<T, fp8>) return ffi::DataType::F8E4M3FN;
  if (is_narrow<T>) return narrow_dtype<T>;
  if (std::is_same_v<T, int32_t>) return ffi::DataType::S32;
  if (std::is_same_v<T, uint32_t>) return ffi::DataType::U32;
  if (std::is_same_v<T, bool>) return ffi::DataType::PRED;
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, bf16> || std::is_same_v<T, fp8> ||
                is_narrow<T> || std::is_same_v<T, int32_t> || std::is_same_v<T, uint32_t> ||
                std::is_same_v<T, bool> || std::is_same_v<T, char>);
  return ffi::DataType::INVALID;
}

// As numpy calls it.
inline std::string name_of(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32: return "float32";
    case ffi::DataType::F64: return "float64";
    case ffi::DataType::F16: return "float16";
    case ffi::DataType::BF16: return "bfloat16";
    case ffi::DataType::F8E4M3FN: return "float8_e4m3fn";
    case ffi::DataType::S8: return "int8";
    case ffi::DataType::U8: return "uint8";
    case ffi::DataType::S32: return "int32";
    case ffi::DataType::U32: return "uint32";
    case ffi::DataType::S64: return "int64";
    case ffi::DataType::PRED: return "bool";
    default: return "XLA's type " + std::to_string(static_cast<int>(dtype));
  }
}

// The buffers of a call, in order; a problem is kept for `error`, once.
class Call {
 public:
  Call(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attrs)
      : args_(args), rets_(rets), attrs_(attrs) {}

  ffi::AnyBuffer arg(size_t i) { return checked(args_.get<ffi::AnyBuffer>(i), i); }
  ffi::AnyBuffer ret(size_t i) {
    auto found = rets_.get<ffi::AnyBuffer>(i);
    if (!found.has_value()) return arg(args_.size());
    return **found;
  }
  // What is read as T must be T; to be looked at after `good` alone, of its contents too.
  template <class T>
  const T* data(size_t i, const std::string& name = "") {
    auto buffer = arg(i);
    if (dtype_of<T>() != ffi::DataType::INVALID && buffer.element_type() != dtype_of<T>()) {
      good((name.empty() ? "operand " + std::to_string(i) : name) + ": the dtype is " +
           name_of(buffer.element_type()) + ", not " + name_of(dtype_of<T>()));
    }
    return buffer.element_count() ? static_cast<const T*>(buffer.untyped_data()) : nullptr;
  }
  long dim(size_t i, size_t axis) { return arg(i).dimensions()[axis]; }
  template <class T>
  T attr(const char* name) {
    auto found = attrs_.get<T>(name);
    if (!found.has_value()) {
      error_ = std::string("attribute ") + name + " is missing or of the wrong type";
      return T{};
    }
    return *found;
  }
  const std::string& error() const { return error_; }
  // Notes what is wrong, if anything is; true if nothing is, here and before.
  bool good(const std::string& problem) {
    if (error_.empty()) error_ = problem;
    return error_.empty();
  }

  // To be looked at after `good` alone.
  Rows rows(size_t i) {
    return Rows{data<int32_t>(i), data<int32_t>(i + 1), data<int32_t>(i + 2), dim(i, 0), dim(i, 1)};
  }
  Geometry geometry(size_t pages, long heads) {
    long kv_heads = dim(pages, 2);
    return Geometry{kv_heads,      heads / kv_heads,         dim(pages, 3), dim(pages, 4),
                    attr<int64_t>("window"), attr<float>("soft_cap")};
  }

 private:
  template <class Found>
  ffi::AnyBuffer checked(Found found, size_t i) {
    if (!found.has_value()) {
      error_ = "buffer " + std::to_string(i) + " is missing";
      return arg(0);
    }
    return *found;
  }

  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  ffi::Dictionary attrs_;
  std::string error_;
};

// The result's memory, holding what the operand holds: XLA lets them be one and the same.
inline void* updated(ffi::AnyBuffer operand, ffi::AnyBuffer result) {
  if (operand.untyped_data() != result.untyped_data()) {
    std::memcpy(result.untyped_data(), operand.untyped_data(), operand.size_bytes());
  }
  return result.untyped_data();
}

// Calls `body(E{})` with the element type of buffer `i`.
template <class Body>
ffi::Error typed(Call& call, size_t i, Body body) {
  switch (call.arg(i).element_type()) {
    case ffi::DataType::F32:
      body(float{});
      break;
    case ffi::DataType::BF16:
      body(bf16{});
      break;
    default:
      return ffi::Error::InvalidArgument("the dtype must be float32 or bfloat16");
  }
  return call.error().empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(call.error());
}

// As `typed`, for pages of 8 bits too.
template <class Body>
ffi::Error typed_pages(Call& call, size_t i, Body body) {
  if (call.arg(i).element_type() != ffi::DataType::F8E4M3FN) return typed(call, i, body);
  body(fp8{});
  return call.error().empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(call.error());
}

inline bool has_small_pages(Call& call, size_t i) {
  return call.arg(i).element_type() == ffi::DataType::F8E4M3FN;
}

}  // namespace pshare

// Defines the symbol `name`, which library.py registers; of the global namespace.
#define PSHARE_HANDLER(name, function)                                                    \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                          \
      name, function, xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs())
