// Jobs on rows, one after the other through the ring of a warp: sums of rows, and copies.
//
// A block has a range of items (tokens, or received rows) and its warps share it evenly, in pieces of rows: few items
// keep all warps busy as well as many do. An item is never shared between blocks.
#pragma once

#include <deep_ep_ep/combine_rows.cuh>
#include <deep_ep_ep/row_ring.cuh>

namespace deep_ep_ep {

inline constexpr int kMaxTopk = 32;  // entries of a token: one a lane
inline constexpr int kMaxBiases = 2;

// A part of a range.
struct Part {
    long long begin;
    long long end;
};

// The part of `[0, num)` that one of several takes: parts follow each other and differ in size by at most one.
__device__ __forceinline__ Part part_of(long long num, int idx, int num_parts) {
    return Part{num * idx / num_parts, num * (idx + 1) / num_parts};
}

// The addresses that a job is about, in shared memory.
struct RowLists {
    const char* rows[kMaxBiases + kMaxTopk];  // what is read, in this order
    char* outs[kMaxTopk];                     // a copy: where each row goes; a sum: [0] is where it goes
};

// What a warp does with one item. The same in all lanes.
struct RowJob {
    int num_rows = 0;
    bool is_copy = false;             // each row to a place of its own; else the sum of all to one place
    unsigned long long in_group = 0;  // bit r: row r is added up with its neighbours first, see `RowSum`
    unsigned long long ends_group = 0;
    int first_piece = 0;
    int end_piece = 0;
};

// Runs the jobs of a warp. All members are called by all 32 lanes together.
//
// `Jobs` says what is to be done with an item, with two functions that are called by all lanes as well:
//     Entry load(int item) const                                        starts to load what describes the item
//     RowJob make(const Entry&, int item, RowLists&, bool is_first) const   writes the lists; sets all but the pieces
// `is_first` is true for exactly one of the warps that share an item.
template <RowType kType>
class RowStream {
   public:
    // `lists` are two of the warp's own.
    __device__ __forceinline__ RowStream(const comm::WaitParams& wait, const RowRing& ring, RowLists* lists,
                                         int row_bytes, int warp, int lane)
        : wait_(wait), ring_(ring), lists_(lists), row_bytes_(row_bytes), warp_(warp), lane_(lane) {}

    // Does this warp's part of the items. True in all lanes if it is done, false if a copy did not come in time; then
    // the stream must not be used again.
    template <class Jobs>
    [[nodiscard]] __device__ __forceinline__ bool run(const Jobs& jobs, const Part& items) {
        const int num_pieces = (row_bytes_ + RowRing::kPieceBytes - 1) / RowRing::kPieceBytes;
        const Part part = part_of((items.end - items.begin) * num_pieces, warp_, RowRing::kNumWarps);
        if (part.begin == part.end) return true;
        const auto first_piece_of = [&part, num_pieces](long long idx) {
            return idx * num_pieces >= part.begin ? 0 : static_cast<int>(part.begin - idx * num_pieces);
        };
        const auto end_piece_of = [&part, num_pieces](long long idx) {
            const long long rest = part.end - idx * num_pieces;
            return rest < num_pieces ? static_cast<int>(rest) : num_pieces;
        };
        const auto make = [&](const auto& entry, long long idx, int slot) {
            const int first_piece = first_piece_of(idx);
            // No lane still reads the list, and then none reads it before it is written.
            __syncwarp();
            RowJob job = jobs.make(entry, static_cast<int>(items.begin + idx), lists_[slot], first_piece == 0);
            __syncwarp();
            job.first_piece = first_piece;
            job.end_piece = end_piece_of(idx);
            return job;
        };
        // Items of this warp, counted from the block's first.
        long long idx = part.begin / num_pieces;
        const long long last_idx = (part.end - 1) / num_pieces;
        auto entry = jobs.load(static_cast<int>(items.begin + idx));
        RowJob job = make(entry, idx, 0);
        if (idx < last_idx) entry = jobs.load(static_cast<int>(items.begin + idx + 1));
        begin_feeding(job, 0);
        for (int slot = 0;; slot ^= 1, ++idx) {
            // The next job is made before this one is done, so that its pieces follow without a gap; what describes the
            // one after that is loaded meanwhile.
            const bool has_next = idx < last_idx;
            RowJob next;
            if (has_next) {
                next = make(entry, idx + 1, slot ^ 1);
                if (idx + 1 < last_idx) entry = jobs.load(static_cast<int>(items.begin + idx + 2));
            }
            is_next_fed_ = !has_next;
            while (feed(next, slot ^ 1)) {
            }
            if (!work(job, slot, next)) return false;
            if (!has_next) return true;
            job = next;
        }
    }

   private:
    __device__ __forceinline__ void begin_feeding(const RowJob& job, int slot) {
        feed_slot_ = slot;
        feed_row_ = 0;
        feed_num_rows_ = job.num_rows;
        feed_end_piece_ = job.end_piece;
        feed_piece_ = job.num_rows == 0 ? job.end_piece : job.first_piece;
    }

    // Starts one load, of the job at hand or, when all of its are under way, of the next one. False if there is nothing
    // to load or no room.
    __device__ __forceinline__ bool feed(const RowJob& next, int next_slot) {
        if (ring_.is_full()) return false;
        if (feed_piece_ == feed_end_piece_) {
            if (is_next_fed_) return false;
            is_next_fed_ = true;
            begin_feeding(next, next_slot);
            if (feed_piece_ == feed_end_piece_) return false;
        }
        const int offset = feed_piece_ * RowRing::kPieceBytes;
        ring_.load(&lists_[feed_slot_].rows[feed_row_], offset, min(RowRing::kPieceBytes, row_bytes_ - offset));
        if (++feed_row_ == feed_num_rows_) {
            feed_row_ = 0;
            ++feed_piece_;
        }
        return true;
    }

    __device__ __forceinline__ bool work(const RowJob& job, int slot, const RowJob& next) {
        const RowLists& lists = lists_[slot];
        for (int piece = job.first_piece; piece < job.end_piece; ++piece) {
            uint4 bits[RowRing::kNumVectors];
            sum_.clear();
            for (int row = 0; row < job.num_rows; ++row) {
                if (!ring_.take(wait_, bits)) return false;
                feed(next, slot ^ 1);
                if (job.is_copy) {
                    store(lists.outs[row], piece, bits);
                } else if ((job.in_group >> row & 1) == 0) {
                    sum_.add(bits);
                } else {
                    sum_.add_to_group(bits);
                    if ((job.ends_group >> row & 1) != 0) sum_.close_group();
                }
            }
            if (!job.is_copy) {
                sum_.round(bits);
                store(lists.outs[0], piece, bits);
            }
        }
        return true;
    }

    __device__ __forceinline__ void store(char* out, int piece, const uint4 (&bits)[RowRing::kNumVectors]) const {
        const int offset = piece * RowRing::kPieceBytes;
        uint4* to = reinterpret_cast<uint4*>(out + offset);
        const int num_vectors = (row_bytes_ - offset) / 16;
#pragma unroll
        for (int v = 0; v < RowRing::kNumVectors; ++v)
            if (v * 32 + lane_ < num_vectors) to[v * 32 + lane_] = bits[v];
    }

    const comm::WaitParams& wait_;
    RowRing ring_;
    RowLists* lists_;
    int row_bytes_;
    int warp_;
    int lane_;
    RowSum<kType, RowRing::kNumVectors> sum_;
    // Where loading stands: the list, the row, and the piece of the job that is being loaded.
    int feed_slot_ = 0;
    int feed_row_ = 0;
    int feed_num_rows_ = 0;
    int feed_piece_ = 0;
    int feed_end_piece_ = 0;
    bool is_next_fed_ = true;  // loading has come to the next job, or there is none
};

}  // namespace deep_ep_ep
