// What sampling is told and what it answers, and the order of candidates in whole numbers.
//
// A candidate's place in the order is `key`: by how many nats it is less likely than the most likely one, times 2^26. Its
// weight (probability relative to the most likely one) times 2^44 is a whole number too. So sums do not depend on the
// order of additions, and a row's choice is a function of that row alone.
#pragma once

#include "common.cuh"

typedef unsigned long long u64;

constexpr uint32_t NONE = ~0u;

// As `SamplingRow` in ops/sampling.rs.
struct SamplingRow {
  float temperature;
  uint32_t top_k;
  float top_p;
  uint32_t min_p_key;
  float typical_p;
  uint32_t seed[2];
  uint32_t position[2];
  float repetition_penalty;
  float frequency_penalty;
  float presence_penalty;
  uint32_t slot;
  uint32_t first_bias;
  uint32_t num_biases;
  uint32_t mask;
  uint32_t token;
  uint32_t top_n;
  uint32_t flags;
  uint32_t unused;
};
constexpr uint32_t ROW_IS_UNUSED = 1, ROW_HAS_PENALTIES = 2;

__device__ __forceinline__ bool changes_logits(const SamplingRow& row) {
  return row.num_biases > 0 || (row.flags & ROW_HAS_PENALTIES) != 0 || row.mask != NONE;
}

// As `Sampled` in ops/sampling.rs.
constexpr unsigned MAX_TOP_N = 20;
struct SampledRow {
  uint32_t token;  // NONE where there is none
  float logprob;
  uint32_t status;
  uint32_t num_top;
  uint32_t top_tokens[MAX_TOP_N];
  float top_logprobs[MAX_TOP_N];
};
constexpr uint32_t CHOSEN = 0, NOT_FINITE = 1, NOTHING_ALLOWED = 2, UNUSED = 3;

// Of one chunk of a row, from the first kernel to the second.
constexpr unsigned CHUNK = 4096;
struct ChunkSummary {
  float raw_max;
  float raw_sum;  // of e^(logit - raw_max)
  float max;      // of the changed logits
  uint32_t argmax;
  uint32_t not_finite;
};
// Logits of which one maximum is kept, so that what has no candidate is not read again.
constexpr unsigned GROUP = 16;

// A token is counted in 16 bits: how often it was generated, and whether it was in the prompt.
constexpr unsigned IN_PROMPT = 0x8000, MOST_GENERATED = 0x7fff;

constexpr float KEYS_PER_NAT = 67108864.0f;
// Of all that are less likely by 64 nats or more: their weight is 0.
constexpr uint32_t FAR_KEY = NONE - 1;

__device__ __forceinline__ uint32_t key_of_distance(float nats) {
  return nats < 64.0f ? static_cast<uint32_t>(nats * KEYS_PER_NAT) : FAR_KEY;
}

// floor(e^-nats * 2^44), without the slow conversion to 64 bits.
__device__ __forceinline__ u64 weight_of_key(uint32_t key) {
  const uint32_t bits = __float_as_uint(__expf(static_cast<float>(key) * (-1.0f / KEYS_PER_NAT)));
  const u64 mantissa = (bits & 0x7fffffu) | 0x800000u;
  const int shift = static_cast<int>(bits >> 23) - (127 + 23 - 44);
  if (shift >= 0) return mantissa << shift;
  return shift > -32 ? mantissa >> -shift : 0;
}

// Philox4x32-10 (Salmon et al. 2011): a number in [0, 1) with 53 random bits, of seed and position alone.
__device__ __forceinline__ double uniform(const uint32_t (&seed)[2], const uint32_t (&position)[2]) {
  uint32_t c[4] = {position[0], position[1], 0, 0}, k[2] = {seed[0], seed[1]};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    if (round > 0) {
      k[0] += 0x9E3779B9u;
      k[1] += 0xBB67AE85u;
    }
    const uint32_t high_0 = __umulhi(0xD2511F53u, c[0]), low_0 = 0xD2511F53u * c[0];
    const uint32_t high_1 = __umulhi(0xCD9E8D57u, c[2]), low_1 = 0xCD9E8D57u * c[2];
    c[0] = high_1 ^ c[1] ^ k[0];
    c[2] = high_0 ^ c[3] ^ k[1];
    c[1] = low_1;
    c[3] = low_0;
  }
  const u64 bits = (static_cast<u64>(c[1]) << 32 | c[0]) >> 11;
  return static_cast<double>(bits) * (1.0 / 9007199254740992.0);
}
