#pragma once

namespace bmm {

// What this machine can do at most, measured now: single-precision multiply-adds on registers, and copying 256 MiB
// per thread (bytes read plus bytes written).
double probe_fma_gflops(int threads);
double probe_copy_gbytes_per_s(int threads);

}  // namespace bmm
