#pragma once

namespace bmm {

// What this machine can do at most, measured now: multiply-adds on registers of float or double, dot products of bf16
// pairs (0 where the chosen instruction set has none), and copying 256 MiB per thread (bytes read plus written).
double probe_f32_gflops(int threads);
double probe_f64_gflops(int threads);
double probe_bf16_gflops(int threads);
double probe_copy_gbytes_per_s(int threads);

}  // namespace bmm
