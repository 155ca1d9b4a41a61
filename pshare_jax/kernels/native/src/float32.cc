// The decoder layer, over weights of every kind, and attention, in float32.

#include "by_dtype.h"

PSHARE_DTYPE(float)
