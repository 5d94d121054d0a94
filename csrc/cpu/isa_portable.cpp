#include "cpu/blend_isa.h"
#include "cpu/isa_kernels.h"

namespace bmm {

// 16 registers of 16 bytes, which x86-64 and AArch64 both have: 8 sums, 2 loads, 1 broadcast.
const Isa isa_portable = make_isa<16, 4, 2>("portable", &blend_portable);

}  // namespace bmm
