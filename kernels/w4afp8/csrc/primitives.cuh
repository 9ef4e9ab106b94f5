// Small device functions over CUTLASS/CuTe primitives.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <stdint.h>

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#include <cutlass/arch/reg_reconfig.h>

namespace w4afp8 {

#define W4AFP8_INLINE __device__ __forceinline__

// Weights pass once: L2 need not keep them. (cute's EVICT_FIRST and EVICT_NORMAL policies.)
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;

W4AFP8_INLINE void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared),
      "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

W4AFP8_INLINE void copy_tensor(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// The same into the shared memory of every CTA of the cluster that `ctas` has a bit for, and to their barriers.
W4AFP8_INLINE void copy_tensor_to(uint16_t ctas, uint32_t shared, const CUtensorMap* map, uint32_t barrier, int column,
                                  int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4}], [%2], %5;" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(ctas)
      : "memory");
}

// One asm block with a bounded number of tries: a C++ loop with a clock spills and serialises the wgmma around it
// (ptxas C7512). Each try suspends for up to a fixed time, so the bound is seconds; then the kernel traps, not hangs.
W4AFP8_INLINE void wait(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{.reg .pred done, again; .reg .u32 tries; mov.u32 tries, 0;\n"
      "WAIT_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra READY_%=; add.u32 tries, tries, 1; setp.lt.u32 again, tries, 4194304; @again bra WAIT_%=; trap;\n"
      "READY_%=: }" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

W4AFP8_INLINE void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

W4AFP8_INLINE void store4(uint32_t shared, int x, int y, int z, int w) {
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

// 4 or 16 bytes, or zeros where `read` is 0; the thread goes on.
template <int kBytes>
W4AFP8_INLINE void copy_async(uint32_t shared, const void* global, int read = kBytes) {
  static_assert(kBytes == 4 || kBytes == 16);
  if constexpr (kBytes == 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(read) : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(read) : "memory");
  }
}

// Arrives when this thread's copies so far are there.
W4AFP8_INLINE void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Programmatic dependent launch: this grid starts while the one before it ends, and the next may start now.
W4AFP8_INLINE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
W4AFP8_INLINE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

W4AFP8_INLINE void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// At the same barrier of another CTA of the cluster. Without `.release.cluster`, which becomes MEMBAR.ALL.GPU: a
// microsecond for each warp and stage. What is released was read, not written.
W4AFP8_INLINE void arrive_at(int cta, uint32_t barrier) {
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(
          barrier),
      "r"(cta)
      : "memory");
}

// All threads of all CTAs of the cluster.
W4AFP8_INLINE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

W4AFP8_INLINE void expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

W4AFP8_INLINE void load4(uint32_t* words, uint32_t shared) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared));
}

W4AFP8_INLINE uint32_t load1(uint32_t shared) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(shared));
  return word;
}

W4AFP8_INLINE float2 load_float2(uint32_t shared) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(shared));
  return pair;
}

// Eight sign-magnitude nibbles to eight e4m3 bytes of value magnitude * 2^-9 (e4m3's subnormals and first binade are
// linear, so a nibble needs no table). Full range stores a negative code as |q| - 1 and adds its sign bit back.
template <bool kFullRange>
W4AFP8_INLINE void convert(uint32_t word, uint32_t& low_row, uint32_t& high_row) {
  low_row = word & 0x87878787u;
  high_row = __funnelshift_r(word, word, 4) & 0x87878787u;
  if constexpr (kFullRange) {
    low_row += (low_row & 0x80808080u) >> 7;
    high_row += (high_row & 0x80808080u) >> 7;
  }
}

// Descriptor of a K-major operand of 128-byte rows with 128-byte swizzle: atoms of 8 rows, 1024 bytes apart.
W4AFP8_INLINE uint64_t operand(uint32_t shared) {
  return (uint64_t)((shared & 0x3ffffu) >> 4) | (uint64_t)1 << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62;
}

template <int kTokens>
struct Mma;
#define W4AFP8_MMA(kTokens)                                                                       \
  template <>                                                                                     \
  struct Mma<kTokens> {                                                                           \
    using Atom = cute::SM90::GMMA::MMA_64x##kTokens##x32_F32E4M3E4M3_RS_TN<>;                     \
    template <size_t... i>                                                                        \
    static W4AFP8_INLINE void call(float* d, const uint32_t* a, uint64_t b, bool add, std::index_sequence<i...>) { \
      Atom::fma(a[0], a[1], a[2], a[3], b, d[i]..., add ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero); \
    }                                                                                             \
    static W4AFP8_INLINE void run(float* d, const uint32_t* a, uint64_t b, bool add) {            \
      call(d, a, b, add, std::make_index_sequence<kTokens / 2>{});                                \
    }                                                                                             \
  };
W4AFP8_MMA(8)
W4AFP8_MMA(16)
W4AFP8_MMA(24)
W4AFP8_MMA(32)
W4AFP8_MMA(40)
W4AFP8_MMA(48)
W4AFP8_MMA(56)
W4AFP8_MMA(64)
W4AFP8_MMA(72)
W4AFP8_MMA(80)
W4AFP8_MMA(88)
W4AFP8_MMA(96)
W4AFP8_MMA(104)
W4AFP8_MMA(112)
W4AFP8_MMA(120)
W4AFP8_MMA(128)
W4AFP8_MMA(136)
W4AFP8_MMA(144)
W4AFP8_MMA(152)
W4AFP8_MMA(160)
W4AFP8_MMA(168)
W4AFP8_MMA(176)
#undef W4AFP8_MMA

W4AFP8_INLINE uint32_t transpose8x8(uint32_t word) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(word));
  return out;
}

// A warp's 16 channels x 8 tokens: two 8x8 transposes, one lane exchange, one 8-byte store = whole 32-byte sectors.
// row: this lane's token row at the warp's first channel. v0, v1: channel lane/4 of tokens 2*(lane%4), +1; v2, v3: +8.
W4AFP8_INLINE void store_bf16(__nv_bfloat16* row, bool ok, int lane, float v0, float v1, float v2, float v3) {
  __nv_bfloat162 low = __floats2bfloat162_rn(v0, v1), high = __floats2bfloat162_rn(v2, v3);
  uint32_t x0 = transpose8x8(*reinterpret_cast<uint32_t*>(&low));
  uint32_t x1 = transpose8x8(*reinterpret_cast<uint32_t*>(&high));
  bool odd = lane & 1;
  uint32_t other = __shfl_xor_sync(~0u, odd ? x0 : x1, 1);
  uint2 out = odd ? make_uint2(other, x1) : make_uint2(x0, other);
  asm volatile("{.reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.v2.b32 [%1], {%2, %3};}" ::"r"((int)ok),
               "l"(row + (lane & 2) * 2 + (odd ? 8 : 0)), "r"(out.x), "r"(out.y)
               : "memory");
}

}  // namespace w4afp8
