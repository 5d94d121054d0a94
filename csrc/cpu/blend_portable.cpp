#include "cpu/blend_kernels.h"

namespace bmm {

const BlendIsa blend_portable = make_blend_isa();

}  // namespace bmm
