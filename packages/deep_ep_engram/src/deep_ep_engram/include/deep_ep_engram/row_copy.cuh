// The copy of rows by the threads of a warp: eight words a thread under way at once.
#pragma once

namespace deep_ep_engram {

// The integer that one load and store moves.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<1> {
    using Type = unsigned char;
};
template <>
struct WordOf<2> {
    using Type = unsigned short;
};
template <>
struct WordOf<4> {
    using Type = unsigned;
};
template <>
struct WordOf<8> {
    using Type = unsigned long long;
};
template <>
struct WordOf<16> {
    using Type = uint4;
};

inline constexpr int kWarpThreads = 32;
inline constexpr int kWordsPerThread = 8;
// Words that a warp has under way: 4 KiB where a word has 16 bytes. With 16 warps on each of 32 SMs that makes 2 MiB,
// which fills the memory of a GPU at a latency of about 0.7 us, and an NVLink at three times of that.
inline constexpr int kSegmentWords = kWarpThreads * kWordsPerThread;

// A source address that is none: nothing is written for the row.
inline constexpr unsigned long long kLeaveOut = ~0ull;
// Another one: the row is filled with zeros.
inline constexpr unsigned long long kZeros = 0;

// Copies `num_words` words, at most a segment. Called by all threads of a warp; source and target are the same in all
// of them, and the source is not `kLeaveOut`.
template <class Word>
__device__ __forceinline__ void copy_piece(Word* to, unsigned long long source, int num_words, int lane) {
    const Word* from = reinterpret_cast<const Word*>(source);
    Word words[kWordsPerThread];
#pragma unroll
    for (int step = 0; step < kWordsPerThread; ++step) {
        const int word = step * kWarpThreads + lane;
        words[step] = source != kZeros && word < num_words ? __ldg(from + word) : Word{};
    }
#pragma unroll
    for (int step = 0; step < kWordsPerThread; ++step) {
        const int word = step * kWarpThreads + lane;
        if (word < num_words) to[word] = words[step];
    }
}

// Copies up to 32 rows that are shorter than a segment, one behind the other in the target. Called by all threads of a
// warp; lane i passes the source of row i, whatever it is past the last row.
//
// row_words: words of a row, less than a segment.
// reciprocal: `row_reciprocal(row_words)`.
template <class Word>
__device__ __forceinline__ void copy_short_rows(Word* to, unsigned long long source, int num_rows, int row_words,
                                                unsigned reciprocal, int lane) {
    const int num_words = num_rows * row_words;
    for (int first = 0; first < num_words; first += kSegmentWords) {
        Word words[kWordsPerThread];
        unsigned is_written = 0;  // a bit a word
#pragma unroll
        for (int step = 0; step < kWordsPerThread; ++step) {
            const int word = first + step * kWarpThreads + lane;
            // Exact: the quotient of a word below 32 segments is off by less than 2^13 * 2^8 / 2^32.
            const int row = row_words == 1 ? word : static_cast<int>(__umulhi(static_cast<unsigned>(word), reciprocal));
            const unsigned long long row_source = __shfl_sync(0xffffffffu, source, row % kWarpThreads);
            const bool is_inside = word < num_words;
            const Word* from = reinterpret_cast<const Word*>(row_source) + (word - row * row_words);
            words[step] =
                is_inside && row_source != kZeros && row_source != kLeaveOut ? __ldg(from) : Word{};
            is_written |= is_inside && row_source != kLeaveOut ? 1u << step : 0u;
        }
#pragma unroll
        for (int step = 0; step < kWordsPerThread; ++step) {
            if ((is_written >> step & 1u) != 0) to[first + step * kWarpThreads + lane] = words[step];
        }
    }
}

// 2^32 / row_words, rounded up; multiplied by it, the upper half of a product is a quotient. Not for 1.
__device__ __forceinline__ unsigned row_reciprocal(int row_words) {
    return 0xffffffffu / static_cast<unsigned>(row_words) + 1;
}

}  // namespace deep_ep_engram
