#include "cpu/blend_isa.h"
#include "cpu/isa_kernels.h"

namespace bmm {

// 16 registers of 32 bytes: 12 sums, 3 loads, 1 broadcast.
const Isa isa_avx2 = make_isa<32, 4, 3>("avx2", &blend_avx2);

}  // namespace bmm
