#include "cpu/blend_kernels.h"

namespace bmm {

const BlendIsa blend_avx2 = make_blend_isa();

}  // namespace bmm
