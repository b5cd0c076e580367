// In place of native/src/arena.cpp, for a build with sanitizers: each piece is one heap allocation of exactly its size.
#include "arena.h"

#include <stdlib.h>

namespace mixlocal {

void Arena::Free::operator()(char* p) const { free(p); }

Arena& Arena::of_this_thread() {
    thread_local Arena arena;
    return arena;
}

void* Arena::take(int64_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, static_cast<size_t>(bytes)) != 0) abort();
    pieces_.push_back({std::unique_ptr<char, Free>(static_cast<char*>(memory)), used_, bytes});
    used_ += bytes + 1;  // so that even an empty piece has a place of its own
    return memory;
}

void Arena::release(int64_t used) {
    while (!pieces_.empty() && pieces_.back().first >= used) pieces_.pop_back();
    used_ = used;
}

}  // namespace mixlocal
