// The parts of the gate's kernel (gate.cu): an expert's score, and a warp that ranks experts.
#pragma once
#include <stdint.h>

namespace w4afp8 {

constexpr uint32_t kMinusInfinity = 0x007fffffu;  // as `key` has it
constexpr uint32_t kNobody = ~0u;

// Floats as integers of the same order. NaN stands above all, as torch sorts it; 0 is below all and stands for nobody.
__device__ __forceinline__ uint32_t key(float x) {
  if (x != x) return ~0u;
  const uint32_t bits = __float_as_uint(__fadd_rn(x, 0.f));  // -0 equals +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// w4afp8.elementwise._exp
__device__ __forceinline__ double exponential(double x) {
  x = x < -700.0 ? -700.0 : x > 700.0 ? 700.0 : x;
  const double exponent = rint(__dmul_rn(x, 1.4426950408889634));
  const double rest = __dsub_rn(x, __dmul_rn(exponent, 0.6931471805599453));
  double y = 1.0 / 3628800;
  y = __dadd_rn(__dmul_rn(y, rest), 1.0 / 362880);
  y = __dadd_rn(__dmul_rn(y, rest), 1.0 / 40320);
  y = __dadd_rn(__dmul_rn(y, rest), 1.0 / 5040);
  y = __dadd_rn(__dmul_rn(y, rest), 1.0 / 720);
  y = __dadd_rn(__dmul_rn(y, rest), 1.0 / 120);
  y = __dadd_rn(__dmul_rn(y, rest), 1.0 / 24);
  y = __dadd_rn(__dmul_rn(y, rest), 1.0 / 6);
  y = __dadd_rn(__dmul_rn(y, rest), 1.0 / 2);
  y = __dadd_rn(__dmul_rn(y, rest), 1.0);
  y = __dadd_rn(__dmul_rn(y, rest), 1.0);
  return __dmul_rn(y, __longlong_as_double(((long long)exponent + 1023) << 52));
}

__device__ __forceinline__ float sigmoid(float x) {
  return __double2float_rn(__ddiv_rn(1.0, __dadd_rn(exponential(-(double)x), 1.0)));
}

// Key of the sum of a group's two best, the same in all lanes; a group has two members or more.
__device__ __forceinline__ uint32_t group_key(const uint32_t* members, int size, int lane) {
  uint32_t first = 0, second = 0;
  for (int i = lane; i < size; i += 32) {
    const uint32_t k = members[i];
    if (k > first) {
      second = first;
      first = k;
    } else {
      second = max(second, k);
    }
  }
  const uint32_t best = __reduce_max_sync(~0u, first);
  if (lane == __ffs((int)__ballot_sync(~0u, first == best)) - 1) first = second;
  return key(__fadd_rn(value(best), value(__reduce_max_sync(~0u, first))));
}

// Bit g for each of the best groups; equals by ascending number. mine: key of the lane's group, 0 where it has none.
__device__ __forceinline__ uint32_t pick_groups(uint32_t mine, int count, int lane) {
  uint32_t picked = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t winner = __ballot_sync(~0u, mine == __reduce_max_sync(~0u, mine));
    const int group = __ffs((int)winner) - 1;
    picked |= 1u << group;
    if (lane == group) mine = 0;
  }
  return picked;
}

// Sums a row of powers as w4afp8.elementwise.halving_sum, whose padding of zeros changes no sum of positive numbers.
template <int kSlots>
__device__ __forceinline__ float halving_sum(const float* powers, int experts, int lane) {
  float sums[kSlots];
#pragma unroll
  for (int j = 0; j < kSlots; ++j) sums[j] = j * 32 + lane < experts ? powers[j * 32 + lane] : 0.f;
#pragma unroll
  for (int half = kSlots / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) sums[j] = __fadd_rn(sums[j], sums[j + half]);
  }
  float sum = sums[0];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, step));
  return sum;
}

// Finds the best top_k of a row, equals by ascending id: lane i gets the i-th id. Expert j * 32 + lane is the lane's
// j-th. There are never fewer experts than top_k, so each round has a winner, whatever NaN there are.
template <int kSlots>
__device__ __forceinline__ uint32_t pick(uint32_t (&keys)[kSlots], int top_k, int lane) {
  uint32_t mine = 0;
  for (int i = 0; i < top_k; ++i) {
    uint32_t best = keys[0];
    int slot = 0;
#pragma unroll
    for (int j = 1; j < kSlots; ++j) {
      if (keys[j] > best) best = keys[j], slot = j;
    }
    const uint32_t most = __reduce_max_sync(~0u, best);
    const uint32_t winner = __reduce_min_sync(~0u, best == most ? (uint32_t)(slot * 32 + lane) : kNobody);
    if (lane == i) mine = winner;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      if (winner == j * 32 + lane) keys[j] = 0;
    }
  }
  return mine;
}

}  // namespace w4afp8
