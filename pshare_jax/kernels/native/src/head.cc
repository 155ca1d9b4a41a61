// The head, of weights of every kind.

#include "head.h"

namespace pshare {

#define PSHARE_HEAD(W)                                                                           \
  template void head(const float*, const float*, const Matrix<W>&, const int32_t*, long, long,   \
                     long, float, bool, const uint32_t*, long, float*, int32_t*);

PSHARE_HEAD(float)
PSHARE_HEAD(bf16)
PSHARE_HEAD(Int8)
PSHARE_HEAD(Int8As<float>)
PSHARE_HEAD(Int8As<bf16>)
PSHARE_HEAD(Fp8As<float>)
PSHARE_HEAD(Fp8As<bf16>)

}  // namespace pshare
