#include "arena.h"

#include <cstdlib>
#include <new>

namespace mixlocal {
namespace {

constexpr int64_t kSmallestPiece = 1 << 20;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

void Arena::Free::operator()(char* p) const { std::free(p); }

Arena& Arena::of_this_thread() {
    thread_local Arena arena;
    return arena;
}

void* Arena::take(int64_t bytes) {
    bytes = aligned(bytes + 64);  // 64 more, so that rows of two arrays do not share cache sets
    if (!pieces_.empty() && used_ < pieces_.back().first) used_ = pieces_.back().first;  // only the last piece serves
    const int64_t end = pieces_.empty() ? 0 : pieces_.back().first + pieces_.back().bytes;
    if (used_ + bytes > end) {
        const int64_t size = aligned(bytes > kSmallestPiece ? bytes : kSmallestPiece) + end / 2 / 64 * 64;
        void* const memory = std::aligned_alloc(64, static_cast<size_t>(size));
        if (!memory) throw std::bad_alloc();
        pieces_.push_back({std::unique_ptr<char, Free>(static_cast<char*>(memory)), end, size});
        used_ = end;
    }
    Piece& piece = pieces_.back();
    void* const memory = piece.memory.get() + (used_ - piece.first);
    used_ += bytes;
    return memory;
}

// Several pieces become one of their whole size as soon as nothing is in use, so that the next operation needs no new one.
void Arena::release(int64_t used) {
    used_ = used;
    if (used > 0 || pieces_.size() < 2) return;
    const int64_t size = pieces_.back().first + pieces_.back().bytes;
    pieces_.clear();
    if (void* const memory = std::aligned_alloc(64, static_cast<size_t>(size)))
        pieces_.push_back({std::unique_ptr<char, Free>(static_cast<char*>(memory)), 0, size});
}

}  // namespace mixlocal
