// The decoder layer, over weights of every kind, and attention, in bfloat16.

#include "by_dtype.h"

PSHARE_DTYPE(bf16)
