// Which kernels there are: decode and prefill kernels for each format of weights and granularity.
#pragma once
#include "w4afp8.h"
#include "decode.cuh"
#include "prefill.cuh"

namespace w4afp8 {

using GemmKernel = void (*)(GemmParams, ActivationMaps);

// A kernel, the tokens of its tiles at most, and the inside of its shared memory.
struct Launch {
  GemmKernel kernel;
  int ctas_per_sm, cluster, token_cap, stage_bytes, fixed_bytes;
  void (*lay_out)(GemmParams&);
};

// expected: rows of a busy expert. sms: multiprocessors.
struct Choice {
  bool token_group;
  Epilogue epilogue;
  int expected, experts, row_tiles, groups, sms;
};

// One instantiation file a format, so that they compile apart.
Launch int4_launch(Choice choice);
Launch int4_full_launch(Choice choice);
Launch int4_group32_launch(Choice choice);
Launch fp8_launch(Choice choice);

// Decode pays while a tile's tokens hide under its weights; above, the tensor cores bound (BENCHMARKS.md).
constexpr int kDecodeRows = 64;  // expected of a busy expert: about 32 on average

// Decode's tiles, smaller and two to a multiprocessor, also pay where prefill's would not fill it this many times.
constexpr int kPrefillRounds = 2;
constexpr int kMostDecodeRows = 256;

// Rounds of tiles from which prefill pays that is unrolled for one epilogue: a tile ends 0.7 to 1.4 us sooner.
constexpr int kLongRounds = 5;

inline bool wants_decode(const Choice& choice) {
  if (choice.expected <= kDecodeRows) return true;
  return choice.expected <= kMostDecodeRows && choice.experts * choice.row_tiles < kPrefillRounds * choice.sms;
}

// Tiles of so few groups are mostly latency, which three CTAs hide better than two; longer ones want deeper rings.
constexpr int kShortGroups = 8;

template <class F, bool kGroupScale, Epilogue kEpilogue>
Launch prefill_launch(const Choice& choice) {
  using R = PrefillRing<F, kEpilogue>;
  constexpr int kCap = prefill_cap<F, kGroupScale, kEpilogue>();
  return {prefill_kernel<F, kGroupScale, kEpilogue>, 1, R::kCluster, kCap, R::stage_bytes(kCap),
          R::fixed_bytes(kCap, choice.experts), R::lay_out};
}

// token_cap: of a tile.
inline bool wants_long(const Choice& choice, int token_cap) {
  const int64_t token_tiles = (choice.expected / 2 + token_cap - 1) / token_cap;
  return choice.experts * choice.row_tiles * token_tiles >= (int64_t)kLongRounds * choice.sms;
}

template <class F, bool kGroupScale, Epilogue kEpilogue>
Launch launch_of(const Choice& choice) {
  if (!wants_decode(choice)) {
    // Only the format that most checkpoints have is worth the time that a further kernel takes to compile.
    if constexpr (F::kCodes == Codes::kInt4) {
      if (!wants_long(choice, F::prefill_cap(kGroupScale))) return prefill_launch<F, kGroupScale, Epilogue::kAny>(choice);
    }
    return prefill_launch<F, kGroupScale, kEpilogue>(choice);
  }
  using R = DecodeRing<F>;
  const int cap = choice.expected <= 8 ? 8 : choice.expected <= 16 ? 16 : choice.expected <= 32 ? 32 : F::decode_cap(kGroupScale);
  if (cap == 8 && choice.groups <= kShortGroups) {
    return {decode_kernel<F, kGroupScale, kEpilogue, 3>, 3, R::kCluster, cap, R::stage_bytes(cap),
            R::fixed_bytes(cap, choice.experts), R::lay_out};
  }
  return {decode_kernel<F, kGroupScale, kEpilogue, 2>, 2, R::kCluster, cap, R::stage_bytes(cap),
          R::fixed_bytes(cap, choice.experts), R::lay_out};
}

template <class F>
Launch launch_for(Choice choice) {
  auto pick = [&](auto group) -> Launch {
    switch (choice.epilogue) {
      case Epilogue::kBf16: return launch_of<F, group(), Epilogue::kBf16>(choice);
      case Epilogue::kF32: return launch_of<F, group(), Epilogue::kF32>(choice);
      default: return launch_of<F, group(), Epilogue::kSwiglu>(choice);
    }
  };
  return choice.token_group ? pick(std::true_type{}) : pick(std::false_type{});
}

}  // namespace w4afp8
