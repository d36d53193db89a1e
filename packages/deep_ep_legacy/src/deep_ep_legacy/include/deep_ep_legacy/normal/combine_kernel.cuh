// Combine of V1's normal calls: each rank stages the rows that it received, and every rank pulls and sums up what its
// tokens became: float32, biases first, then by increasing rank, rounded once.
//
// A rank's stage has, for each source rank, as many slots as a round has tokens of it, so that a token's row lies at
// the same place on every rank, which the source knows from the token alone. All blocks of all ranks' kernels wait for
// each other, so all must be resident at once.
#pragma once

#include <deep_ep_legacy/normal/opening.cuh>

namespace deep_ep_legacy::normal {

inline constexpr int kMaxBiases = 2;
// What a lane sums at a time: vectors of 16 bytes, of several ranks whose loads wait together.
inline constexpr int kNumVectors = 2;
inline constexpr int kNumTogether = 4;
inline constexpr int kNumElements = 8;  // bfloat16 in 16 bytes
inline constexpr int kPieceBytes = kNumVectors * 32 * 16;

// Mirrored in `deep_ep_legacy.device.normal_kernels`. N, R, K and M as in `dispatch_params.cuh`.
struct CombineParams {
    Places places;
    Opening opening;
    const void* x;                   // [M] rows of bfloat16
    const float* topk_weights;       // [M, K]
    const void* biases[kMaxBiases];  // [N] rows, or null
    const bool* is_token_in_rank;    // of the handle, as the next two
    const int* rank_prefix_matrix;
    const int* recv_src_idx;
    void* out;                       // [N] rows
    float* out_weights;              // [N, K]
    int num_tokens, num_recv, num_topk, row_bytes;
    int num_slots;                   // tokens of a source rank that a stage has room for
};

struct CombineShared {
    PeerOpenings peers;
    int recv_begin[comm::kMaxLsaRanks + 1];  // first row of each source
};

// The stage of a rank: a row a slot, by source rank and token; then their weights.
class CombineStage {
   public:
    __device__ __forceinline__ CombineStage(const CombineParams& p, int rank)
        : p_(p), begin_(comm::window_pointer<char>(p.places.team, rank, p.places.stage_offset)) {}

    __device__ __forceinline__ char* row(int src, int slot) const {
        return begin_ + (static_cast<long long>(src) * p_.num_slots + slot) * p_.row_bytes;
    }

    __device__ __forceinline__ float* weights(int src, int slot) const {
        return reinterpret_cast<float*>(row(p_.places.team.num_ranks, 0)) +
               (static_cast<long long>(src) * p_.num_slots + slot) * p_.num_topk;
    }

   private:
    const CombineParams& p_;
    char* begin_;
};

// Stages the received rows whose tokens are those from `first` on, as many of each source as there are slots. Called by
// all threads of each block.
__device__ __forceinline__ void stage_received(const CombineParams& p, const CombineShared& shared, int first) {
    const CombineStage stage(p, p.places.team.rank);
    const int lane = static_cast<int>(threadIdx.x) % 32, num_ranks = p.places.team.num_ranks;
    const Part part = part_of(min(shared.recv_begin[num_ranks], p.num_recv), warp_of_rank(), num_rank_warps());
    for (int begin = static_cast<int>(part.begin); begin < part.end; begin += 32) {
        const int row = begin + lane;
        int src = 0, slot = -1;
        if (row < part.end) {
            src = block_of(shared.recv_begin, num_ranks, row);
            slot = p.recv_src_idx[row] - first;
        }
        unsigned rest = __ballot_sync(kAllLanes, slot >= 0 && slot < p.num_slots);
        for (; rest != 0; rest &= rest - 1) {
            const int i = __ffs(rest) - 1;
            const long long from = begin + i;
            const int to_src = __shfl_sync(kAllLanes, src, i), to_slot = __shfl_sync(kAllLanes, slot, i);
            copy_row(stage.row(to_src, to_slot), static_cast<const char*>(p.x) + from * p.row_bytes, p.row_bytes);
            for (int k = lane; k < p.num_topk; k += 32)
                stage.weights(to_src, to_slot)[k] = p.topk_weights[from * p.num_topk + k];
        }
    }
}

// The elements of 16 bytes, added to a sum. A bfloat16 is the upper half of a float32.
__device__ __forceinline__ void add_row(float (&sum)[kNumElements], const uint4& bits) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum[2 * i] += __uint_as_float(words[i] << 16);
        sum[2 * i + 1] += __uint_as_float(words[i] & 0xffff0000u);
    }
}

// Rounds two numbers to the nearest bfloat16, ties to even; the first is the lower half of the word.
// cvt.rn.bf16x2.f32. PTX ISA: "Data Movement and Conversion Instructions: cvt".
__device__ __forceinline__ unsigned round_pair(float low, float high) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// Sums up one piece of a token. Called by all lanes of a warp.
__device__ __forceinline__ void sum_piece(const CombineParams& p, int token, int slot, int piece) {
    const int lane = static_cast<int>(threadIdx.x) % 32, num_ranks = p.places.team.num_ranks;
    const long long begin = static_cast<long long>(token) * p.row_bytes;
    const int offset = piece * kPieceBytes + lane * 16;
    const auto has_vector = [&](int v) { return offset + v * 32 * 16 < p.row_bytes; };
    const auto load = [&](const void* row, int v) {
        return has_vector(v) ? *reinterpret_cast<const uint4*>(static_cast<const char*>(row) + offset + v * 32 * 16)
                             : uint4{0, 0, 0, 0};
    };
    float sum[kNumVectors][kNumElements] = {};
#pragma unroll
    for (int i = 0; i < kMaxBiases; ++i) {
        if (p.biases[i] == nullptr) continue;
#pragma unroll
        for (int v = 0; v < kNumVectors; ++v) add_row(sum[v], load(static_cast<const char*>(p.biases[i]) + begin, v));
    }
    for (int first = 0; first < num_ranks; first += 32) {
        const bool has_rank = first + lane < num_ranks &&
                              p.is_token_in_rank[static_cast<long long>(token) * num_ranks + first + lane];
        unsigned rest = __ballot_sync(kAllLanes, has_rank);
        while (rest != 0) {
            uint4 rows[kNumTogether][kNumVectors];
            unsigned taken = rest;
#pragma unroll
            for (int i = 0; i < kNumTogether; ++i, taken &= taken - 1) {
                if (taken == 0) continue;
                const char* row = CombineStage(p, first + __ffs(taken) - 1).row(p.places.team.rank, slot);
#pragma unroll
                for (int v = 0; v < kNumVectors; ++v) rows[i][v] = load(row, v);
            }
#pragma unroll
            for (int i = 0; i < kNumTogether; ++i, rest &= rest - 1) {
                if (rest == 0) continue;
#pragma unroll
                for (int v = 0; v < kNumVectors; ++v) add_row(sum[v], rows[i][v]);
            }
        }
    }
#pragma unroll
    for (int v = 0; v < kNumVectors; ++v) {
        if (!has_vector(v)) continue;
        const float(&numbers)[kNumElements] = sum[v];
        *reinterpret_cast<uint4*>(static_cast<char*>(p.out) + begin + offset + v * 32 * 16) =
            uint4{round_pair(numbers[0], numbers[1]), round_pair(numbers[2], numbers[3]),
                  round_pair(numbers[4], numbers[5]), round_pair(numbers[6], numbers[7])};
    }
}

// Sums up this rank's tokens from `first` on, as many as there are slots, and their weights. Called by all threads of
// each block, when all ranks have staged.
__device__ __forceinline__ void sum_tokens(const CombineParams& p, int first) {
    const int num = min(p.num_slots, p.num_tokens - first);
    if (num <= 0) return;
    const int num_pieces = (p.row_bytes + kPieceBytes - 1) / kPieceBytes;
    const Part part = part_of(static_cast<long long>(num) * num_pieces, warp_of_rank(), num_rank_warps());
    for (long long i = part.begin; i < part.end; ++i) {
        const int slot = static_cast<int>(i / num_pieces);
        sum_piece(p, first + slot, slot, static_cast<int>(i - static_cast<long long>(slot) * num_pieces));
    }
    const int num_ranks = p.places.team.num_ranks;
    const long long num_weights = static_cast<long long>(num) * p.num_topk;
    for (long long i = blockIdx.x * kNumThreads + threadIdx.x; i < num_weights; i += gridDim.x * kNumThreads) {
        const int slot = static_cast<int>(i / p.num_topk), k = static_cast<int>(i % p.num_topk);
        const long long token = first + slot;
        float sum = 0;
        for (int rank = 0; rank < num_ranks; ++rank)
            if (p.is_token_in_rank[token * num_ranks + rank])
                sum += CombineStage(p, rank).weights(p.places.team.rank, slot)[k];
        p.out_weights[token * p.num_topk + k] = sum;
    }
}

// The kernel's body. A timeout or a disagreement is in the record; the kernel itself ends all the same.
__device__ __forceinline__ void combine(const CombineParams& p) {
    __shared__ CombineShared shared;
    RankState* state = p.places.state;
    const int num_ranks = p.places.team.num_ranks, thread_idx = static_cast<int>(threadIdx.x);
    const unsigned long long epoch = state->epoch + 1;
    unsigned long long round = state->round;
    const unsigned digest = handle_digest(p.rank_prefix_matrix, num_ranks, shared.peers);
    // The other blocks find out as they wait for this rank's opening too.
    if (blockIdx.x == 0 && opens(p.places)) send_opening(p.places, p.opening, epoch, digest);
    bool is_right = receive_openings(p.places, p.opening, epoch, digest, shared.peers);
    // If a dispatch before has failed, its handle may be anything.
    if (__syncthreads_or(thread_idx == 0 && comm::has_expired(p.places.wait)) != 0) is_right = false;
    for (int src = thread_idx; src <= num_ranks; src += kNumThreads)
        shared.recv_begin[src] = src == 0 ? 0 : p.rank_prefix_matrix[(src - 1) * num_ranks + p.places.team.rank];
    __syncthreads();
    const int num = is_right ? num_rounds(shared.peers.num_tokens, num_ranks, p.num_slots) : 0;
    for (int i = 0; i < num && is_right; ++i) {
        const int first = i * p.num_slots;
        // The window is still being read.
        if (i > 0 && !wait_for_round(p.places, &Flags::pulled, round, kPhasePulled)) {
            is_right = false;
            break;
        }
        ++round;
        stage_received(p, shared, first);
        if (is_last_block(&state->num_staged)) publish_round(p.places, &Flags::staged, round);
        is_right = wait_for_round(p.places, &Flags::staged, round, kPhaseStaged);
        if (!is_right) break;
        sum_tokens(p, first);
        if (!is_last_block(&state->num_pulled)) continue;
        publish_round(p.places, &Flags::pulled, round);
        // Behind the kernel the window may be filled again, or be given back.
        if (i + 1 == num) is_right = wait_for_round(p.places, &Flags::pulled, round, kPhasePulled);
    }
    if (leave(state) && thread_idx == 0) {
        if (state->has_opened != 0) state->epoch = epoch;
        if (num > 0) state->round = round;
    }
}

}  // namespace deep_ep_legacy::normal
