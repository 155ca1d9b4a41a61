// Lossless coding of bfloat16 KV pages; kernels/kv_codec/api.py has the format.
//
// Sign and mantissa (8 bits) are kept as they are. Exponents become codes of `planes` bits, 64 values
// at a time: one 64-bit word a plane. The last code says that the exponent itself follows, in order,
// at the end of the record.
//
// With 3 planes a code is the distance to a base exponent of the value's channel; with 4 planes it is
// the place in one table of 15 exponents.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>
#if defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512VBMI2__)
#include <immintrin.h>
#define PSHARE_CODEC_AVX512 1
#elif defined(__AVX2__)
#include <immintrin.h>
#define PSHARE_CODEC_AVX2 1
#endif

namespace pshare {

constexpr long kGroup = 64;

// Where the values of a page are, and what their exponents are coded by.
struct CodedPage {
  long layers, stride, values;  // values of a layer, which begin `stride` values after one another
  long block, channels;         // values that have the same bases, a row of which is `channels` long
  const uint8_t* book;          // bases [layers * values / block, channels], or a table of 15
  long size() const { return layers * values; }
};

// The codes of a book, for the groups of one block after the other.
template <int kPlanes>
class Codes {
 public:
  static constexpr int kEscape = (1 << kPlanes) - 1;

  explicit Codes(const CodedPage& page) : page_(page) {
    if constexpr (kPlanes == 4) {
      std::memset(code_of_, kEscape, sizeof code_of_);
      std::memset(exponent_of_, 0, sizeof exponent_of_);
      for (int code = kEscape - 1; code >= 0; code--) code_of_[page.book[code]] = code;
      std::memcpy(exponent_of_, page.book, kEscape);
    } else {
      period_ = std::lcm(page.channels, kGroup);
      tile_.resize(period_);
    }
  }

  void enter(long block) {
    if constexpr (kPlanes == 3) {
      const uint8_t* row = page_.book + block * page_.channels;
      for (long i = 0; i < period_; i += page_.channels) {
        std::memcpy(tile_.data() + i, row, page_.channels);
      }
      at_ = 0;
    }
  }

  // What follows is for one group of 64; `next` goes on to the next one of the block.
  const uint8_t* bases() const { return tile_.data() + at_; }
  const uint8_t* code_of() const { return code_of_; }
  const uint8_t* exponent_of() const { return exponent_of_; }
  void next() {
    if constexpr (kPlanes == 3) {
      at_ += kGroup;
      if (at_ == period_) at_ = 0;
    }
  }

 private:
  const CodedPage& page_;
  std::vector<uint8_t> tile_;
  long period_ = kGroup, at_ = 0;
  alignas(64) uint8_t code_of_[256];
  alignas(64) uint8_t exponent_of_[64];
};

#if defined(PSHARE_CODEC_AVX512)

inline __m512i low_bytes(__m512i a, __m512i b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(a)),
                            _mm512_cvtepi16_epi8(b), 1);
}

template <int kPlanes>
inline uint64_t encode_group(const uint16_t* x, const Codes<kPlanes>& codes, uint8_t* low,
                             uint64_t* words, uint8_t* escapes) {
  const __m512i m7f = _mm512_set1_epi16(0x7f), m80 = _mm512_set1_epi16(0x80);
  __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + 32);
  // (m7f & x) | (m80 & x >> 8): the mantissa's 7 bits below the sign.
  auto rest = [&](__m512i v) {
    return _mm512_ternarylogic_epi64(_mm512_and_si512(v, m7f), _mm512_srli_epi16(v, 8), m80, 0xf8);
  };
  _mm512_storeu_si512(low, low_bytes(rest(a), rest(b)));
  __m512i e = low_bytes(_mm512_srli_epi16(a, 7), _mm512_srli_epi16(b, 7)), c;
  if constexpr (kPlanes == 3) {
    __m512i base = _mm512_loadu_si512(codes.bases());
    c = _mm512_min_epu8(_mm512_sub_epi8(e, base), _mm512_set1_epi8(codes.kEscape));
  } else {
    const uint8_t* t = codes.code_of();
    __m512i first = _mm512_permutex2var_epi8(_mm512_load_si512(t), e, _mm512_load_si512(t + 64));
    __m512i second =
        _mm512_permutex2var_epi8(_mm512_load_si512(t + 128), e, _mm512_load_si512(t + 192));
    c = _mm512_mask_blend_epi8(_mm512_movepi8_mask(e), first, second);
  }
  uint64_t escaped = ~uint64_t{0};
  for (int p = 0; p < kPlanes; p++) {
    words[p] = _mm512_test_epi8_mask(c, _mm512_set1_epi8(1 << p));
    escaped &= words[p];
  }
  // A store of all 64 bytes: compressing stores are slow on some processors.
  if (escaped) _mm512_storeu_si512(escapes, _mm512_maskz_compress_epi8(escaped, e));
  return escaped;
}

template <int kPlanes>
inline void decode_group(uint16_t* x, const Codes<kPlanes>& codes, const uint8_t* low,
                         const uint64_t* words, uint64_t escaped, const uint8_t* escapes) {
  const __m512i m7f = _mm512_set1_epi16(0x7f), m80 = _mm512_set1_epi16(0x80);
  __m512i c = _mm512_maskz_set1_epi8(words[0], 1), e;
  for (int p = 1; p < kPlanes; p++) {
    c = _mm512_or_si512(c, _mm512_maskz_set1_epi8(words[p], 1 << p));
  }
  if constexpr (kPlanes == 3) {
    e = _mm512_add_epi8(c, _mm512_loadu_si512(codes.bases()));
  } else {
    e = _mm512_permutexvar_epi8(c, _mm512_load_si512(codes.exponent_of()));
  }
  if (escaped) {
    int count = __builtin_popcountll(escaped);
    __mmask64 there = count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    e = _mm512_mask_expand_epi8(e, escaped, _mm512_maskz_loadu_epi8(there, escapes));
  }
  auto join = [&](__m256i exponent, const uint8_t* from) {
    __m512i wide = _mm512_slli_epi16(_mm512_cvtepu8_epi16(exponent), 7);
    __m512i s = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
    __m512i sign = _mm512_slli_epi16(_mm512_and_si512(s, m80), 8);
    return _mm512_or_si512(_mm512_or_si512(wide, sign), _mm512_and_si512(s, m7f));
  };
  _mm512_storeu_si512(x, join(_mm512_castsi512_si256(e), low));
  _mm512_storeu_si512(x + 32, join(_mm512_extracti64x4_epi64(e, 1), low + 32));
}

#else

// Bit `p` of 64 bytes as a word.
inline uint64_t plane_of(const uint8_t* c, int p) {
#if defined(PSHARE_CODEC_AVX2)
  auto half = [&](const uint8_t* from) {
    __m256i v = _mm256_slli_epi16(_mm256_loadu_si256((const __m256i*)from), 7 - p);
    return static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(v)));
  };
  return half(c) | half(c + 32) << 32;
#else
  uint64_t word = 0;
  for (int i = 0; i < 8; i++) {
    uint64_t eight;
    std::memcpy(&eight, c + 8 * i, 8);
    eight = (eight >> p) & 0x0101010101010101u;
    word |= (eight * 0x0102040810204080u >> 56) << (8 * i);
  }
  return word;
#endif
}

// Adds bit `p`, a word of 64, to 64 bytes.
inline void add_plane(uint8_t* c, uint64_t word, int p) {
#if defined(PSHARE_CODEC_AVX2)
  const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                          0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
  for (int half = 0; half < 2; half++) {
    __m256i v = _mm256_set1_epi32(static_cast<int>(word >> (32 * half)));
    v = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(v, byte), bit), bit);
    auto* at = reinterpret_cast<__m256i*>(c + 32 * half);
    v = _mm256_and_si256(v, _mm256_set1_epi8(1 << p));
    _mm256_storeu_si256(at, _mm256_or_si256(_mm256_loadu_si256(at), v));
  }
#else
  for (int i = 0; i < 8; i++) {
    uint64_t bits = (word >> (8 * i) & 0xff) * 0x0101010101010101u & 0x8040201008040201u;
    uint64_t eight;
    std::memcpy(&eight, c + 8 * i, 8);
    // A byte that is not 0 gets its highest bit, then bit p.
    eight |= ((bits + 0x7f7f7f7f7f7f7f7fu | bits) >> 7 & 0x0101010101010101u) << p;
    std::memcpy(c + 8 * i, &eight, 8);
  }
#endif
}

template <int kPlanes>
inline uint64_t encode_group(const uint16_t* x, const Codes<kPlanes>& codes, uint8_t* low,
                             uint64_t* words, uint8_t* escapes) {
  uint8_t e[kGroup], c[kGroup];
  for (int i = 0; i < kGroup; i++) {
    low[i] = static_cast<uint8_t>((x[i] & 0x7f) | (x[i] >> 8 & 0x80));
    e[i] = static_cast<uint8_t>(x[i] >> 7);
  }
  if constexpr (kPlanes == 3) {
    const uint8_t* base = codes.bases();
    for (int i = 0; i < kGroup; i++) {
      c[i] = std::min<uint8_t>(static_cast<uint8_t>(e[i] - base[i]), codes.kEscape);
    }
  } else {
    for (int i = 0; i < kGroup; i++) c[i] = codes.code_of()[e[i]];
  }
  uint64_t escaped = ~uint64_t{0};
  for (int p = 0; p < kPlanes; p++) escaped &= words[p] = plane_of(c, p);
  for (uint64_t left = escaped; left; left &= left - 1) *escapes++ = e[__builtin_ctzll(left)];
  return escaped;
}

template <int kPlanes>
inline void decode_group(uint16_t* x, const Codes<kPlanes>& codes, const uint8_t* low,
                         const uint64_t* words, uint64_t escaped, const uint8_t* escapes) {
  uint8_t e[kGroup] = {0};
  for (int p = 0; p < kPlanes; p++) add_plane(e, words[p], p);
  if constexpr (kPlanes == 3) {
    const uint8_t* base = codes.bases();
    for (int i = 0; i < kGroup; i++) e[i] = static_cast<uint8_t>(e[i] + base[i]);
  } else {
    for (int i = 0; i < kGroup; i++) e[i] = codes.exponent_of()[e[i]];
  }
  for (uint64_t left = escaped; left; left &= left - 1) e[__builtin_ctzll(left)] = *escapes++;
  for (int i = 0; i < kGroup; i++) {
    x[i] = static_cast<uint16_t>(e[i] << 7 | (low[i] & 0x7f) | (low[i] & 0x80) << 8);
  }
}

#endif

// Calls `group(values, first value's number)` for all groups of a page, in order.
template <int kPlanes, class Value, class Group>
bool for_groups(Value* x, const CodedPage& page, Codes<kPlanes>& codes, Group group) {
  long n = 0, block = 0;
  for (long layer = 0; layer < page.layers; layer++) {
    Value* at = x + layer * page.stride;
    for (long left = page.values / page.block; left > 0; left--) {
      codes.enter(block++);
      for (long i = 0; i < page.block; i += kGroup, n += kGroup, at += kGroup, codes.next()) {
        if (!group(at, n)) return false;
      }
    }
  }
  return true;
}

// Writes the record of a page; its bytes, or -1 where it would take more than `capacity`.
template <int kPlanes>
long encode_page(const uint16_t* x, const CodedPage& page, uint8_t* out, long capacity) {
  Codes<kPlanes> codes(page);
  uint8_t* planes = out + page.size();
  long fixed = page.size() + page.size() / 8 * kPlanes, length = fixed;
  if (capacity < fixed) return -1;
  bool fits = for_groups<kPlanes>(x, page, codes, [&](const uint16_t* from, long n) {
    uint64_t words[kPlanes];
    uint8_t spare[kGroup];
    bool room = capacity - length >= kGroup;
    uint8_t* to = room ? out + length : spare;
    long count = __builtin_popcountll(encode_group<kPlanes>(from, codes, out + n, words, to));
    std::memcpy(planes + n / 8 * kPlanes, words, sizeof words);
    if (!room) {
      if (count > capacity - length) return false;
      std::memcpy(out + length, spare, count);
    }
    length += count;
    return true;
  });
  return fits ? length : -1;
}

// Reads a record of `length` bytes; false where it is not as long as its codes say.
template <int kPlanes>
bool decode_page(const uint8_t* in, long length, const CodedPage& page, uint16_t* x) {
  Codes<kPlanes> codes(page);
  const uint8_t* planes = in + page.size();
  long at = page.size() + page.size() / 8 * kPlanes;
  if (length < at) return false;
  bool whole = for_groups<kPlanes>(x, page, codes, [&](uint16_t* to, long n) {
    uint64_t words[kPlanes], escaped = ~uint64_t{0};
    std::memcpy(words, planes + n / 8 * kPlanes, sizeof words);
    for (int p = 0; p < kPlanes; p++) escaped &= words[p];
    long count = __builtin_popcountll(escaped);
    if (count > length - at) return false;
    decode_group<kPlanes>(to, codes, in + n, words, escaped, in + at);
    at += count;
    return true;
  });
  return whole && at == length;
}

}  // namespace pshare
