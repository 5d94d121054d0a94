#include "cpu/blend_isa.h"
#include "cpu/isa_kernels.h"

namespace bmm {

// 32 registers of 64 bytes: 24 sums, 3 loads, 1 broadcast, and 8 broadcasts for 24 multiply-adds.
const Isa isa_avx512 = make_isa<64, 8, 3>("avx512", &blend_avx512);

}  // namespace bmm
