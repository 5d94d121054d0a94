#include "cpu/gram_kernel.h"

namespace bmm {

// 16 registers of 32 bytes: 12 sums, 3 loads, 1 broadcast.
const GramIsa gram_avx2 = make_isa<32, 4, 3>("avx2");

}  // namespace bmm
